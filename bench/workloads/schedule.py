"""A schedule: a plan's tasks in the order of their tickets, with what the models of a GPU ask about it."""

from __future__ import annotations

from collections.abc import Sequence

Tensor = tuple[int, int, bool]  # elements, bytes of an element, whether the gradient is regularized
Task = tuple[str, int, int]  # "reduce", "update" or "whole"; tensor; chunk


class Schedule:
    """Tasks of these tensors, which are cut into chunks of `chunk_elements`.

    Attributes:
        reduces: Of each tensor, its REDUCE tasks.
        first_chunk: Of each tensor, its first chunk's number among those of all tensors; then the number of all chunks.
    """

    def __init__(self, tensors: Sequence[Tensor], tasks: Sequence[Task], chunk_elements: int) -> None:
        self.tensors, self.tasks, self.chunk_elements = tensors, tasks, chunk_elements
        self.reduces = [0] * len(tensors)
        for kind, tensor, _ in tasks:
            self.reduces[tensor] += kind == "reduce"
        self.first_chunk = [0]
        for elements, _, _ in tensors:
            self.first_chunk.append(self.first_chunk[-1] + -(-elements // chunk_elements))

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(elements for elements, _, _ in self.tensors)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        return sum(elements * itemsize for elements, itemsize, _ in self.tensors)

    def chunk_number(self, tensor: int, chunk: int) -> int:
        """Return a chunk's number among those of all tensors."""
        return self.first_chunk[tensor] + chunk

    def elements_of(self, tensor: int, chunk: int) -> int:
        """Return the elements of a chunk."""
        return min(self.chunk_elements, self.tensors[tensor][0] - chunk * self.chunk_elements)

    def check(self) -> None:
        """Raise ValueError if an UPDATE has a smaller ticket than one of its tensor's REDUCEs: it could hang."""
        updated = set()
        for kind, tensor, _ in self.tasks:
            if kind != "reduce":
                updated.add(tensor)
            elif tensor in updated:
                raise ValueError("an UPDATE has a smaller ticket than one of its tensor's REDUCEs")
