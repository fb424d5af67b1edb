"""From text to arrays: tokenizers and the order of rows."""
