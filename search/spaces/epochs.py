"""How long to train by the number of images: few of them need more epochs, and many give enough steps in one or two."""

import math

from search.spaces.space import Range

REFERENCE_IMAGES, REFERENCE_EPOCHS = 6000, 10
"""Training images for which that many epochs are the most: all of Oxford-IIIT Pet."""
MOST, FEWEST = 40, 3
"""The limits of the most epochs."""
SPREAD = 4
"""The most epochs / the fewest. Above 3, so that `--scheduler halving` has two lengths."""
TYPICAL_IMAGES = 2000
"""Training images that a description without data assumes."""


def epochs_for(num_images: int) -> Range:
    """The epochs to search for that many training images.

    Steps grow with the square root of the images: between one epoch after another, whose steps would grow with the
    images themselves, and a fixed number of steps, with which large sets would not be seen once. BiT's rule (Kolesnikov
    et al. 2020) grows as slowly. At a batch size of 32: 80 to 320 steps for 250 images, 380 to 1,900 for 6,000.
    """
    high = round(REFERENCE_EPOCHS * math.sqrt(REFERENCE_IMAGES / max(1, num_images)))
    high = min(max(high, FEWEST), MOST)
    return Range(max(1, high // SPREAD), high)


def middle(epochs: Range) -> int:
    """The epochs of trial 0: twice the fewest, as far as there are so many."""
    return round(epochs.clip(2 * epochs.low))
