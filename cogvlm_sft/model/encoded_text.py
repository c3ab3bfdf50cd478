"""One row of token ids, with where its pictures stand and which characters each token covers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cogvlm_sft.errors import ModelInputError


@dataclass(slots=True)
class EncodedText:
    """One row before padding.

    Attributes:
        input_ids: Placeholders hold the pad id.
        token_type_ids: 1 on boi, patches and eoi.
        offsets: Characters of the source text that each token covers; (0, 0) where there are none.
        answers: Token ranges [start, end) of the answers of earlier rounds.
        merged: For each of `answers`, whether its last token also holds what follows the answer.
    """

    input_ids: list[int] = field(default_factory=list)
    token_type_ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    merged: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], kind: int, offsets: Sequence[tuple[int, int]]) -> None:
        """Appends tokens of one kind (1 for a picture's)."""
        self.input_ids.extend(ids)
        self.token_type_ids.extend([kind] * len(ids))
        self.offsets.extend(offsets)

    def find_answers(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fills `answers` and `merged` from the characters of each answer, its space included."""
        at = 0
        for start, end in spans:
            while at < len(self.offsets) and self.offsets[at][1] <= start:
                at += 1
            first = at
            while at < len(self.offsets) and start <= self.offsets[at][0] < end:
                at += 1
            self.answers.append((first, at))
            self.merged.append(at > first and self.offsets[at - 1][1] > end)

    def truncate(self, max_length: int, where: str) -> None:
        """Cuts the row behind `max_length` tokens.

        Args:
            max_length: Tokens to keep.
            where: What to name in the message, such as "row 2: ".

        Raises:
            ModelInputError: The cut would fall into a picture.
        """
        end = max((i + 1 for i, kind in enumerate(self.token_type_ids) if kind), default=0)
        if max_length < end:
            # The first words are those by which TRL knows this mistake and adds its own advice.
            raise ModelInputError(
                f"Image features and image tokens do not match: {where}max_length is {max_length}, "
                f"but the last image ends at token {end}; raise max_length, or set it to None"
            )
        del self.input_ids[max_length:]
        del self.token_type_ids[max_length:]
        del self.offsets[max_length:]
