"""Shapes of the gradients of known models, generated from their architecture."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]

_BERT_LAYERS = 24
_BERT_HIDDEN = 1024
_BERT_INTERMEDIATE = 4096
_BERT_WORDS = 30522
_BERT_POSITIONS = 512

HELP = (
    "resnet50: 161 tensors, 102 MB in float32. bert-large: 398 tensors, scaled down to fit in"
    " memory: all 24 layers, but half the width and a quarter of the words of the embedding."
    " tiny2000: 2000 tensors of 1 to 64 elements."
)


def resnet50() -> Shapes:
    """ResNet-50 with 1000 classes: 161 tensors, 25,557,032 elements.

    Source: He et al., arXiv 1512.03385, table 1, with the stride in the 3 x 3 convolution and
    a projection in the first block of each stage; convolutions have no bias.
    """
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        out = 4 * width
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if block == 0:
                convolutions.append((out, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]  # and the scale and shift of its norm
            channels = out
    return [*shapes, (1000, channels), (1000,)]


def bert_large(width_divisor: int = 2, words_divisor: int = 4) -> Shapes:
    """BERT-large with its pre-training heads: 398 tensors, scaled down.

    With divisors of 1 it is the model itself, of 335 million parameters: 1.3 GB in float32, which
    a rank needs several times.

    Source: Devlin et al., arXiv 1810.04805: 24 layers; the width and the vocabulary are divided.
    """
    hidden = _BERT_HIDDEN // width_divisor
    intermediate, words = _BERT_INTERMEDIATE // width_divisor, _BERT_WORDS // words_divisor
    norm: Shapes = [(hidden,), (hidden,)]
    square: Shapes = [(hidden, hidden), (hidden,)]
    layer = [
        *square * 4,  # query, key, value, output
        *norm,
        *[(intermediate, hidden), (intermediate,)],
        *[(hidden, intermediate), (hidden,)],
        *norm,
    ]
    embeddings: Shapes = [(words, hidden), (_BERT_POSITIONS, hidden), (2, hidden), *norm]
    word_head: Shapes = [*square, *norm, (words,)]  # its matrix is the embedding's
    return [*embeddings, *layer * _BERT_LAYERS, *square, *word_head, (2, hidden), (2,)]


def tiny2000() -> Shapes:
    """2000 vectors of 1 to 64 elements: all overhead."""
    return [(1 + 37 * index % 64,) for index in range(2000)]


PRESETS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "bert-large": bert_large,
    "tiny2000": tiny2000,
}
