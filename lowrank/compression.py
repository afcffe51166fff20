"""Low-rank factors of trained weights, given statistics of inputs and outputs. Pure linear algebra: no GPT in here.

A layer y = W x, W (m, n), is to become y = U A x, U (m, r), A (r, n). With C = E[x x^T] of its inputs and G = E[g g^T]
of the loss's gradients g = dL/dy at its outputs, the error that counts is

    E ~ tr(G (W - U A) C (W - U A)^T),

the second-order change of the loss where x and g are independent (Kronecker-factored Fisher: Martens and Grosse,
arXiv:1503.05671). With square roots R^T R = G and L L^T = C it is the norm of R W L - R U A L, so that Eckart and
Young's theorem gives the optimum: with E_r the first r left singular vectors of R W L,

    U = R^-1 E_r,   A = E_r^T R W.

No inverse of C is needed. G = I is SVD-LLM's criterion (arXiv:2403.07378), the output error; C = G = I the plain SVD.
Statistics are singular where tokens are few or an input is constant, hence a ridge on both: it settles the directions
that the calibration text has not shown, as the plain SVD would. Full rank is W itself, whatever the statistics.
"""

import torch

RIDGE = 1e-6                        # of the mean of a diagonal; 1e-2 gives the same losses to 1e-4 nats


def factor(weight, rank, inputs=None, gradients=None):
    """U (m, r) and A (r, n) in float64, on the CPU, U A being the best approximation of weight (m, n) of rank r.

    inputs: E[x x^T] (n, n) of what is multiplied; gradients: E[g g^T] (m, m) of the loss's gradients at the products.
    Both positive semi-definite; None: the identity. U and A are balanced, U^T U = A A^T, so that
    neither loses more to float32 than the other. r above min(m, n): zeros fill up. Raises ValueError for r
    below 1, for shapes that do not fit and for what is not finite.
    """
    weight, inputs, gradients = (None if t is None else t.detach().cpu().double() for t in (weight, inputs, gradients))
    m, n = weight.shape
    if rank < 1:
        raise ValueError(f'rank={rank}: must be at least 1 (nearest: 1)')
    named = ('weight', weight, (m, n)), ('inputs', inputs, (n, n)), ('gradients', gradients, (m, m))
    for name, tensor, shape in named:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f'{name} of shape {tuple(tensor.shape)}: must be {shape}')
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f'{name}: not finite')
    approximation = weight
    if rank < min(m, n) and (inputs is not None or gradients is not None):
        root, inverse = square_root(gradients, m)                   # R, R^-1 (m, m)
        scaled = root @ weight                                      # (m, n)
        leading = torch.linalg.svd(scaled @ square_root(inputs, n)[0], full_matrices=False)[0][:, :rank]    # (m, r)
        approximation = inverse @ leading @ (leading.mT @ scaled)   # (m, n), of rank r
    return balanced(approximation, rank)


def square_root(statistic, size):
    """Symmetric root (size, size) of a statistic with a ridge, and the root's inverse. None, and nothing but zeros,
    which say as little: identities."""
    identity = torch.eye(size, dtype=torch.float64)
    level = 0 if statistic is None else statistic.diagonal().mean()
    if not level > 0:
        return identity, identity
    values, vectors = torch.linalg.eigh(statistic / level)
    roots = (values.clamp_min(0) + RIDGE).sqrt()                    # (size)
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT


def balanced(product, rank):
    """product (m, n) of at most that rank -> U (m, r), A (r, n), the plain truncated SVD's roots on either side."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    kept = min(rank, len(s))
    u, root, vh = u[:, :kept], s[:kept].sqrt(), vh[:kept]
    up, down = product.new_zeros(len(product), rank), product.new_zeros(rank, product.size(1))
    up[:, :kept], down[:kept] = u * root, root[:, None] * vh
    return up, down
