"""Subspace: a flow that acts on k directions and leaves all others alone."""

import torch
from torch import Tensor

from innsteer.errors import InputError
from innsteer.flows.base import Flow

# Bases from a float32 SVD or QR are orthonormal to about 1e-6; an error e in B'B comes back as an
# error e in the round trip, and 1e-5 of the displacement is what float32 flows are held to.
TOLERANCE = 1e-5


class Subspace(Flow):
    """A narrow flow inside a wide space: z = x + (inner(x B) - x B) B'.

    Coordinates along the k columns of B go through ``inner``; the orthogonal complement passes
    untouched. As B'B = I, the map is exactly invertible, and its log-determinant is the inner
    one's. An identity ``inner`` gives the identity bit for bit, for the edit is a difference.

    Args:
        inner: a flow of width k.
        basis: ``[d, k]``, orthonormal columns; saved as a buffer. To load weights into an empty
            one, build it with ``torch.eye(d, k)``.

    Raises:
        InputError: another shape, or columns that are not orthonormal.

    >>> from innsteer.flows import Reverse
    >>> flow = Subspace(Reverse(2), torch.eye(3, 2))
    >>> flow(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 1., 3.]])
    """

    basis: Tensor

    def __init__(self, inner: Flow, basis: Tensor) -> None:
        _check(inner, basis)
        super().__init__(basis.shape[0])
        self.inner = inner
        # torch.linalg.qr gives a transposed layout, which safetensors refuses to save
        basis = basis.detach().clone(memory_format=torch.contiguous_format)
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        """Rows moved within the subspace."""
        c = x @ self.basis
        return x + (self.inner.forward(c) - c) @ self.basis.mT

    def inverse(self, z: Tensor) -> Tensor:
        """Rows moved back within the subspace."""
        c = z @ self.basis
        return z + (self.inner.inverse(c) - c) @ self.basis.mT

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows moved within the subspace and the inner log-determinant."""
        c = x @ self.basis
        moved, log_det = self.inner.forward_log_det(c)
        return x + (moved - c) @ self.basis.mT, log_det

    @property
    def fixed_log_det(self) -> Tensor:
        """The inner flow's fixed log-determinant."""
        return self.inner.fixed_log_det

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the inner flow on the rows' k coordinates."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InputError(f"rows of shape {tuple(x.shape)}", expected=f"[n, {self.width}]")
        self.inner.initialise(x @ self.basis)
        return self.forward(x)


def _check(inner: Flow, basis: Tensor) -> None:
    """Refuse a basis on which the inner flow cannot act invertibly."""
    k = inner.width
    if basis.ndim != 2 or basis.shape[1] != k or basis.shape[0] < k:
        raise InputError(
            f"a basis of shape {tuple(basis.shape)} for an inner flow of width {k}",
            expected=f"[d, {k}] with d of at least {k}",
        )
    b = basis.detach().double()
    error = float((b.mT @ b - torch.eye(k, dtype=b.dtype, device=b.device)).abs().max())
    if not error <= TOLERANCE:  # "not <=" so that NaN is refused too
        raise InputError(
            f"the basis columns are not orthonormal: B'B is off the identity by {error:.3g}",
            expected=f"at most {TOLERANCE:g}",
            remedy="orthonormalise them, for example with torch.linalg.qr(basis)[0]",
        )
