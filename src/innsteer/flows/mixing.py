"""Linear maps between couplings: Reverse, Permute, Householder, LU.

Couplings move half of the coordinates each; these decide which halves meet. The first three are
orthogonal, with log|det| = 0.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from innsteer.errors import InputError
from innsteer.flows.base import Flow


class Orthogonal(Flow):
    """What flows that keep volume share: a log-determinant of 0."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed rows and zeros."""
        return self.forward(x), x.new_zeros(x.shape[0])


class Reverse(Orthogonal):
    """The coordinates in reverse order, so that the next coupling moves the other half.

    In a stack of our own couplings ``AffineCoupling(flip=True)`` does the same without a copy.

    >>> Reverse(3)(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 2., 1.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Reversed rows."""
        return x.flip(-1)

    def inverse(self, z: Tensor) -> Tensor:
        """Reversed rows again: it is its own inverse."""
        return z.flip(-1)


class Permute(Orthogonal):
    """A fixed random order of the coordinates: z_i = x_order[i].

    The order is a buffer and is saved: a later torch may draw another one from the same seed.

    >>> flow = Permute(4, seed=1)
    >>> x = torch.arange(4.0)[None]
    >>> torch.equal(flow.inverse(flow(x)), x)
    True
    """

    order: Tensor

    def __init__(self, width: int, *, seed: int = 0) -> None:
        super().__init__(width)
        self.register_buffer("order", random_order(width, seed))

    def forward(self, x: Tensor) -> Tensor:
        """Rows in the random order."""
        return x.index_select(1, self.order)

    def inverse(self, z: Tensor) -> Tensor:
        """Rows in the first order."""
        return restore(z, self.order)

    def back(self) -> Self:
        """A permutation that undoes this one."""
        other = type(self)(self.width)
        other.order.copy_(self.order.argsort())
        return other


class Householder(Orthogonal):
    """A learned orthogonal map: the product of k reflections H_i = I - 2 v_i v_i' / (v_i' v_i).

    z = x H_1 H_2 ... H_k, computed at once as x - (x V) T V' with the upper triangular
    T^-1 = strict_upper(V'V) + diag(V'V) / 2: two thin products and a k x k solve instead of k
    steps. Lengths of the v_i do not matter, only their directions. Starts at a random rotation.

    Reference: Accumulating Householder transformations, revisited (Joffrain et al. 2006),
    https://doi.org/10.1145/1141885.1141886

    Args:
        width: d.
        reflections: k, at least 1; an even number gives determinant +1.
        seed: of the directions; the global generators are left alone.

    >>> flow = Householder(4, reflections=2)
    >>> x = torch.arange(4.0)[None]
    >>> torch.allclose(flow(x).norm(), x.norm())
    True
    """

    def __init__(self, width: int, *, reflections: int = 8, seed: int = 0) -> None:
        super().__init__(width)
        if reflections < 1:
            raise InputError(f"{reflections} reflections", expected="at least 1")
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(reflections, width, generator=generator)
        self.vectors = nn.Parameter(F.normalize(vectors, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Rotated rows, ``x Q``."""
        t: Tensor = torch.linalg.solve_triangular(
            self._t_inverse(), F.linear(x, self.vectors), upper=True, left=False
        )
        return x - t @ self.vectors

    def inverse(self, z: Tensor) -> Tensor:
        """Rows rotated back, ``z Q'``: T is transposed, the rest is the same."""
        t: Tensor = torch.linalg.solve_triangular(
            self._t_inverse().mT, F.linear(z, self.vectors), upper=False, left=False
        )
        return z - t @ self.vectors

    def _t_inverse(self) -> Tensor:
        """The upper triangular ``T^-1``, ``[k, k]``."""
        gram = self.vectors @ self.vectors.mT
        return gram.triu(1) + torch.diag(gram.diagonal() / 2)

    def back(self) -> Self:
        """A map with weights of its own that undoes this one as it is now."""
        other = type(self)(self.width, reflections=len(self.vectors))
        with torch.no_grad():
            other.vectors.copy_(self.vectors.flip(0))
        return other


class LU(Flow):
    """A learned invertible matrix in triangular factors: z = L D U (P x).

    P is a fixed random permutation, L and U have unit diagonals, D = diag(exp(g)) with
    g = bound * tanh(raw / bound), and log|det| = sum(g). All factors lie in one ``[d, d]``
    parameter, L below its diagonal, raw on it, U above. It starts at z = P x. The inverse takes
    two triangular solves.

    Memory and cost grow as d^2. Only the diagonal is bounded: large off-diagonal weights still
    make the inverse ill-conditioned, so use weight decay and watch the round trip.

    Reference: Glow (Kingma and Dhariwal 2018), eq. 10, https://arxiv.org/abs/1807.03039

    Args:
        width: d.
        bound: the largest \\|g\\|, in nats.
        seed: of P; the global generators are left alone.

    >>> flow = LU(4)
    >>> x = torch.arange(4.0)[None]
    >>> torch.equal(flow.inverse(flow(x)), x)
    True
    """

    order: Tensor

    def __init__(self, width: int, *, bound: float = 1.0, seed: int = 0) -> None:
        super().__init__(width)
        if not bound > 0:
            raise InputError(f"LU bound {bound}", expected="a positive number of nats")
        self.bound = bound
        self.register_buffer("order", random_order(width, seed))
        self.packed = nn.Parameter(torch.zeros(width, width))

    @property
    def log_diagonal(self) -> Tensor:
        """The bounded log-diagonal g, ``[d]``."""
        return self.bound * torch.tanh(self.packed.diagonal() / self.bound)

    def forward(self, x: Tensor) -> Tensor:
        """Permuted rows times the three factors."""
        return self._multiply(x, self.log_diagonal)

    def inverse(self, z: Tensor) -> Tensor:
        """Two triangular solves, then the permutation back; rows stand left of the matrix."""
        packed = self.packed.mT
        solve = torch.linalg.solve_triangular
        y = solve(packed, z, upper=True, left=False, unitriangular=True)
        y = y * (-self.log_diagonal).exp()
        return restore(solve(packed, y, upper=False, left=False, unitriangular=True), self.order)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed rows and sum(g), the same for every row."""
        g = self.log_diagonal
        return self._multiply(x, g), g.sum().expand(x.shape[0])

    def _multiply(self, x: Tensor, g: Tensor) -> Tensor:
        """Rows times factors: the unit diagonals are added as the rows themselves."""
        x = x.index_select(1, self.order)
        y = (x + F.linear(x, self.packed.triu(1))) * g.exp()
        return y + F.linear(y, self.packed.tril(-1))

    def back(self) -> Self:
        """A fresh map, with weights of its own, whose permutation undoes this one's."""
        other = type(self)(self.width, bound=self.bound)
        other.order.copy_(self.order.argsort())
        return other


def random_order(width: int, seed: int) -> Tensor:
    """A seeded permutation of the coordinates, int64 ``[width]``."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def restore(z: Tensor, order: Tensor) -> Tensor:
    """Undo ``index_select(1, order)``: every column of a copy of z is written over once."""
    return z.index_copy(1, order, z)
