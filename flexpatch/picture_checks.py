"""The checks of a verification again, on prompts with images: of the text model and the tower."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from flexpatch.internals import decoder_of, pretrained
from flexpatch.layouts import Drawn, Media, media_of
from flexpatch.pictures import together
from flexpatch.registry import INSTALLED, Adapter
from flexpatch.row_images import set_shown, shown_with
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Tree
from flexpatch.trials import Gradients, distance
from flexpatch.verification import FACTOR, Verification


def takes_images(model: nn.Module) -> bool:
    """Tell whether rows of a model may hold images, in this release of transformers."""
    record = media_of(pretrained(model).config)
    return record is not None and Version(record.since) <= INSTALLED


class PictureVerification(Verification):
    """One run of all checks on prompts with images. Its images are drawn as the record of the model's class says."""

    def _draw(self, generator: torch.Generator) -> list[Tree]:
        self.config_of_all = pretrained(self.model).config
        record = media_of(self.config_of_all)
        assert record is not None
        self.record = record
        allowed = plain_ids(self.config_of_all, self.config.vocab_size)

        def ids(length: int) -> list[int]:
            return allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist()

        texts = [ids(length) for length in (5, 4, 29, 11, 9, 6, 5, 7, 6, 12, 8, 3, 5, 9)]
        # The leak check changes all of the first answer, which must come first in a row: those are sorted by bytes.
        texts[2][0] = int(allowed[0])
        texts[3][0] = int(allowed[allowed % 256 > texts[2][0] % 256][0])
        first, second, other = (record.draw(self.config_of_all, number, generator) for number in (0, 1, 0))
        pixels = record.images.names[0]  # made bright: to a trained tower all noise looks alike
        other = Drawn({**other.tensors, pixels: other.tensors[pixels] / 2 + 1.5}, other.tokens)
        self.equal = picture_trees(record, texts, (first, second, first))
        return picture_trees(record, texts, (first, second, other))

    def _add(self, name: str, error: float, bound: float, detail: str = "", margin: float | None = None) -> None:
        super()._add(
            f"{name}, images" if margin is None else name.replace(": ", ", images: ", 1), error, bound, detail, margin
        )

    def _add_gradients(self, name: str, ours: Gradients, oracle: Gradients, stock: Gradients, bound: float) -> None:
        """Compare gradients of the text model, and of all that makes tokens of images, each with its own norm."""
        text = self._text_parameters()
        for part, inside in (("", True), (", tower", False)):
            names = [each for each in oracle if (each in text) == inside]
            if not names:
                continue  # parameters that are frozen
            mine, true, own = ({each: gradients[each] for each in names} for gradients in (ours, oracle, stock))
            allowed = max(bound if self.exact else 0.0, FACTOR * distance(own, true)[0])
            error, worst = distance(mine, true)
            self._add(f"{name}{part}", error, allowed, f"worst in {worst}")

    def _text_parameters(self) -> set[str]:
        inner = pretrained(self.model)
        parts = [decoder_of(inner), inner.get_output_embeddings()]
        known = {id(parameter) for part in parts for parameter in part.parameters()}
        return {name for name, parameter in self.model.named_parameters() if id(parameter) in known}

    def _breakages(self, broken: Rows, positions: bool) -> Iterator[tuple[str, Rows, Adapter | None]]:
        inner = pretrained(self.model)
        shown = shown_with(inner, self.rows)
        yield "answers see each other", broken, None
        yield "taken as equal", build_rows([self.equal]).to(self.device), None
        if shown.rows.last is not None:
            dropped = replace(shown, rows=replace(shown.rows, last=None))
            yield "blocks dropped", set_shown(inner, replace(self.rows), dropped), None
        if "position_ids" in shown.arguments:
            others = {name: value for name, value in shown.arguments.items() if name != "position_ids"}
            plain = replace(shown, arguments=others)
            yield "positions of one axis", set_shown(inner, replace(self.rows), plain), None

    def _check_ways(self, oracles: Any, bounds: tuple[float, float], stock: Tensor, margin: float) -> None:
        """Leave mixers to the checks of text: they see no images."""

    def _uses_positions(self) -> bool:
        return True


def plain_ids(config: Any, vocabulary: int) -> Tensor:
    """List ids that mark nothing, and do not when the leak check changes them.

    Args:
        config: Of a multimodal class.
        vocabulary: Ids are smaller.

    Returns:
        (ids,) int64.
    """
    settings = {**vars(config), **vars(config.get_text_config())}
    marks = [value for name, value in settings.items() if "token" in name and isinstance(value, int)]
    ids = torch.arange(3, vocabulary)
    usable = vocabulary - 3
    changed = (ids - 3 + usable // 2) % usable + 3
    return ids[~(torch.isin(ids, torch.tensor(marks)) | torch.isin(changed, torch.tensor(marks)))]


def picture_trees(record: Media, texts: Sequence[list[int]], images: Sequence[Drawn]) -> list[Tree]:
    """Make trees of images: one, two, an image in two prompts, one after equal text, and none.

    Args:
        record: Of a multimodal class.
        texts: Fourteen runs of token ids.
        images: Three, of which the last is as large as the first.

    Returns:
        Trees; images at other places than the root's only where prompts may stand behind answers.
    """
    first, second, other = images
    begin, question, chosen, rejected, middle, yes, no, maybe, never, plain, *answers = texts

    def shown(*some: Drawn) -> dict[str, Tensor]:
        return together(record.images, [some])

    def asked(image: Drawn, *replies: list[int]) -> Tree:
        return Tree(image.tokens + question, [Tree(each) for each in replies], answer=False, images=shown(image))

    two = [*begin, *first.tokens, *middle, *second.tokens, *question]
    trees = [
        Tree.of([*begin, *first.tokens, *question], chosen, rejected, images=shown(first)),
        Tree.of([*begin, *other.tokens, *question], yes, no, images=shown(other)),
        Tree.of(two, maybe, never, images=shown(first, second)),
        Tree.of(plain, *answers),
    ]
    if not record.text_blocks:
        trees[1] = Tree(middle, [asked(first, yes, no), asked(other, maybe, yes + no)])
    return trees
