"""Questions that a data set and its benchmark must put alike.

What a build trains on and what `cogvlm_sft.evaluation` asks come from these functions, so that no
score is lost to other words. The wording of boxes is the released code's own (its templates of
grounding say "answer in [[x0,y0,x1,y1]] format."), that of options is LLaVA's for ScienceQA.
"""

from collections.abc import Sequence

_LETTER = "Answer with the option's letter from the given choices directly."
_BOX = "answer in [[x0,y0,x1,y1]] format."

WHERE_IS = f"Where is {{}}? {_BOX}"


def pointing(question: str) -> str:
    """A question whose answer is a box."""
    return f"{question.strip()} {_BOX}"


def lettered(question: str, options: Sequence[str], hint: str = "") -> str:
    """A question whose answer is the letter of an option.

    Args:
        question: Without its options.
        options: They stand behind it as lines "A. …".
        hint: Stands before it, on a line of its own; empty for none.
    """
    lines = [f"{chr(ord('A') + index)}. {option.strip()}" for index, option in enumerate(options)]
    front = [hint.strip()] if hint.strip() else []
    return "\n".join([*front, question.strip(), *lines, _LETTER])
