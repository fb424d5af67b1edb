"""The layout that prompts of reasoning tasks ask for: one reasoning block, then one answer block."""

REASONING_TAGS = ("<reasoning>", "</reasoning>")
_TAGS = (*REASONING_TAGS, "<answer>", "</answer>")


def two_blocks(text: str) -> bool:
    """Whether the text is one reasoning block and then one answer block, and nothing else."""
    text = text.strip()
    reasoning, _, answer = text.partition("</reasoning>")
    return (
        all(text.count(tag) == 1 for tag in _TAGS)
        and reasoning.startswith("<reasoning>")
        and answer.lstrip().startswith("<answer>")
        and answer.endswith("</answer>")
    )
