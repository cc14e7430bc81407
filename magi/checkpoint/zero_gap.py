"""Finds where a file's numbers give way to zeros: a download that broke off after room for all of it was reserved.

Zeros alone are nothing bad: biases, norms, and rows and layers that were never trained or shrank to nothing consist of
them. But those end with a row of a matrix, or keep to some columns in all rows. The numbers before a gap break off inside
a row, where the row before went on; or nothing but zeros follows them, over several matrices and all that is between.
"""

import itertools
import math

from .mapped_file import MappedFile

_PART = 1 << 20  # bytes read at a time
_PAGE = 1 << 12  # bytes at the beginning of the next matrix that must be zero, too
_LEAST = 32  # zeros in a row that mean something: in float8 a few are nothing unusual
_SEVERAL = 3  # matrices
_SUBSTANTIAL = 1 << 24  # bytes of zeros that need no numbers before them to be a gap


def zero_gap(file: MappedFile) -> str | None:
    """Returns the name of a tensor in which a file's numbers give way to zeros, or have; None where they do not.

    It looks at the last numbers of each matrix.
    """
    names = file.in_order()
    return _gap_at_the_end(file, names) or _gap_between(file, names)


def _gap_between(file: MappedFile, names: list[str]) -> str | None:
    matrices = [name for name in names if _is_matrix(file, name)]
    for name, following in itertools.pairwise(matrices):
        if _breaks_off(file, name) and not any(file.raw(following, 0, _PAGE)):
            return name
    return None


def _gap_at_the_end(file: MappedFile, names: list[str]) -> str | None:
    """Returns a tensor at which the zeros have begun, if those at the end of a file are a gap."""
    matrices = nbytes = 0  # of zeros
    for name in reversed(names):
        if not _is_zero(file, name):
            goes_on = _is_matrix(file, name) and _breaks_off(file, name)
            return name if goes_on or matrices >= _SEVERAL else None
        matrices += _is_matrix(file, name)
        nbytes += file.tensors[name].nbytes
        if matrices >= _SEVERAL and nbytes >= _SUBSTANTIAL:
            return name
    return None  # a small file that holds nothing else: meant so


def _is_matrix(file: MappedFile, name: str) -> bool:
    return file.tensors[name].nbytes > 0 and sum(n > 1 for n in file.tensors[name].shape) > 1


def _is_zero(file: MappedFile, name: str) -> bool:
    return _zeros_at_end(file, name) == file.tensors[name].nbytes


def _breaks_off(file: MappedFile, name: str) -> bool:
    """Tells whether a matrix ends in zeros that begin inside a row, below numbers of the row before."""
    info = file.tensors[name]
    item = max(1, info.nbytes // math.prod(info.shape))
    row = info.nbytes // next(n for n in info.shape if n > 1)
    zeros = _zeros_at_end(file, name) // item * item
    end = info.nbytes - zeros
    if zeros < _LEAST * item or end <= row:
        return False
    above = file.raw(name, end - row, (end - 1) // row * row)  # from the end's column on
    items = [above[i : i + item] for i in range(0, len(above), item)]
    return sum(map(any, items)) > len(items) // 2


def _zeros_at_end(file: MappedFile, name: str) -> int:
    """Returns how many of a tensor's last bytes are zero."""
    size = end = file.tensors[name].nbytes
    part = _PAGE  # mostly the first one holds a number
    while end:
        start = max(0, end - part)
        numbers = file.raw(name, start, end).rstrip(b"\0")
        if numbers:
            return size - start - len(numbers)
        end, part = start, _PART
    return size
