"""What a policy can do: decoding, grading, intervals, decoding order; and what a likelihood estimator is worth."""
