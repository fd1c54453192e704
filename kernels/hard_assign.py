# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Each patch goes to one group, a group becomes the mean of its patches (VisToG: Huang et al. 2024, arXiv 2411.17773;
the mechanism is GroupViT's: Xu et al. 2022, arXiv 2202.11094).

    X_ij = q_i . k_j / sqrt(d) + g_ij          group i, patch j; g Gumbel noise, or 0
    index_j = argmax_i X_ij                    the lowest i of the largest X
    lse_j = log sum_i e^(X_ij / tau),   A_ij = e^(X_ij / tau - lse_j)                 softmax over the groups
    count_i = patches with index i,     c_i = count_i + eps
    G_i = sum_(j: index_j = i) v_j / c_i

Backward, straight through (the one-hot matrix H has the gradient of A, in the sum and in c):
    dv_j = dG_(index_j) / c_(index_j)
    dA_ij = dG_i . (v_j - G_i) / c_i,   dX_ij = A_ij (dA_ij - sum_k A_kj dA_kj) / tau
    dq_i = sum_j dX_ij k_j / sqrt(d),   dk_j = sum_i dX_ij q_i / sqrt(d)

Shapes: q (B, M, d), k and v (B, N, d), one dtype: fp32, fp16, bf16, fp64 (reference); M <= 256 in the kernels.
Returns G (B, M, d) in that dtype, index (B, N) int32, count (B, M) and lse (B, N) fp32 (fp64). Gradients of G only.
Noise: a tensor (B, M, N), or a seed: g = -log(-log u), u = max(tl.rand(seed, (b M + i) N + j), 2^-32), Philox, made
anew in the backward; gumbel() gives the same numbers in PyTorch. eps = 0 makes an empty group 0 / 0 = NaN, and a
tiny eps its gradients huge (in fp16 inf): eps = 1 is the published value. NaN in X: lse is NaN, index is some group.
Error: products of 16-bit numbers are summed up in fp32; dX is rounded to the dtype for its two products, and in fp16
it may underflow, as all gradients do. Logits that differ by less than about 1e-6 may be told apart either way.

No races and no atomics: an output element is written by one program, and no program reads what its launch writes.
Floor, b bytes an element: forward (2 N + 2 M) B d b + 4 B (2 N + M) bytes, (2 M + 1) B N d FLOPs; backward reads q, k,
v, dG and G, writes dq, dk and dv: (4 N + 4 M) B d b bytes, 8 B M N d FLOPs. PyTorch makes about six fp32 (B, M, N)
tensors in the forward. In a multimodal model all this is under 1 % of a step: it saves launches and memory.
"""
import torch
import torch.nn.functional as F

from kernels._common import DTYPES, HAS_TRITON, INTERPRET, aot_case, assert_kernel, block_sizes, check
from kernels._common import last_dim_contiguous, launch, tl, triton, use_triton


# ------------------------------------------------------------------ reference
def gumbel(seed, number):
    """The kernels' noise of a seed at element numbers (int64), fp32: Philox-4x32-10, as tl.rand has it."""
    low = 2 ** 32 - 1                                         # int64 products wrap around: their bits are still right
    c0, c1, c2, c3, k0, k1 = number & low, number >> 32, number * 0, number * 0, seed & low, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    u = torch.minimum(c0, low - c0).float() * 4.6566127342e-10                            # [0, 1)
    return -(-u.clamp(min=2.0 ** -32).log()).log()


def hard_assign_ref(q, k, v, tau, eps, seed=None, noise=None):
    """Plain PyTorch, in fp32 (fp64 for fp64 inputs); the CPU path."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5                                  # (B, M, N)
    if seed is not None:
        noise = gumbel(seed, torch.arange(x.numel(), device=x.device).view(x.shape))      # (B, M, N)
    x = x if noise is None else x + noise.to(wide)
    lse = (x / tau).logsumexp(1)                                                          # (B, N)
    soft = (x / tau).softmax(1)                                                           # (B, M, N)
    index = x.max(1).indices                                                              # (B, N), the first of equals
    groups = torch.arange(x.shape[1], device=x.device)
    hard = (index[:, None] == groups[:, None]).to(wide)                                   # (B, M, N)
    through = hard + (soft - soft.detach())                   # exactly hard, with the gradient of soft
    g = through @ v.to(wide) / (through.sum(2, keepdim=True) + eps)                        # (B, M, d)
    return g.to(v.dtype), index.int(), hard.sum(2), lse.detach()


# ------------------------------------------------------------------ kernels
@triton.jit
def _gumbel(seed, number):
    """Gumbel noise of these elements; u = 0 would be -inf."""
    u = tl.maximum(tl.rand(seed, number), 2.3283064365386963e-10)                         # 2**-32
    return -tl.log(-tl.log(u))


@triton.jit
def _logits(z, b, n, m, M, N, scale, seed, noise_ptr, NOISE: tl.constexpr):
    """X (BLOCK_N, MP) of patches n and groups m from z = k q^T; -inf for m >= M."""
    x = z * scale
    number = (b * M + m[None, :]) * N + n[:, None]
    if NOISE == "seed":
        x += _gumbel(seed, number)
    if NOISE == "tensor":
        x += tl.load(noise_ptr + number, mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
    return tl.where((m < M)[None, :], x, -float("inf"))


@triton.jit
def _tile(ptr, row, stride, n_rows, cols, d):
    """A tile (rows, columns) of a matrix at ptr with n_rows rows and d columns, zeros outside."""
    return tl.load(ptr + (row[:, None] * stride + cols[None, :]),
                   mask=(row < n_rows)[:, None] & (cols < d)[None, :], other=0.0)


@triton.jit
def _hard_assign_fwd_kernel(q_ptr, k_ptr, noise_ptr, index_ptr, lse_ptr, stride_qb, stride_q, stride_kb, stride_k,
                            M, N, d, scale, tau, seed, NOISE: tl.constexpr, MP: tl.constexpr,
                            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_N patches of one image against all groups. Reads k once, writes 8 bytes a patch."""
    pid, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    b, n = pid // tiles, pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, MP).to(tl.int64)
    z = tl.zeros((BLOCK_N, MP), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        k = _tile(k_ptr + b * stride_kb, n, stride_k, N, cols, d)                         # (BLOCK_N, BLOCK_D)
        q = _tile(q_ptr + b * stride_qb, m, stride_q, M, cols, d)                         # (MP, BLOCK_D)
        z = tl.dot(k, tl.trans(q), z, input_precision="ieee")
    x = _logits(z, b, n, m, M, N, scale, seed, noise_ptr, NOISE)                          # (BLOCK_N, MP)
    top = tl.max(x, axis=1)
    # lowest group of the maximum; a minimum needs no tie rule of argmax, and M - 1 is for NaN, equal to nothing
    index = tl.min(tl.where(x == top[:, None], m[None, :], M - 1), axis=1)
    lse = top / tau + tl.log(tl.sum(tl.exp((x - top[:, None]) / tau), axis=1))
    tl.store(index_ptr + (b * N + n), index.to(tl.int32), mask=n < N)
    tl.store(lse_ptr + (b * N + n), lse, mask=n < N)


@triton.jit
def _hard_assign_mean_kernel(v_ptr, index_ptr, g_ptr, count_ptr, stride_vb, stride_v, M, N, d, eps,
                             MP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of all groups of one image, a one-hot product. Reads v once, writes G."""
    pid, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(d, BLOCK_D)
    b, cols = pid // tiles, pid % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.arange(0, MP).to(tl.int64)
    total = tl.zeros((MP, BLOCK_D), tl.float32)
    count = tl.zeros((MP,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        index = tl.load(index_ptr + (b * N + n), mask=n < N, other=-1)
        hard = tl.arange(0, MP)[:, None] == index[None, :]                                # (MP, BLOCK_N)
        v = _tile(v_ptr + b * stride_vb, n, stride_v, N, cols, d)                         # (BLOCK_N, BLOCK_D)
        total = tl.dot(hard.to(v.dtype), v, total, input_precision="ieee")
        count += tl.sum(hard.to(tl.float32), axis=1)
    g = total / (count + eps)[:, None]
    tl.store(g_ptr + ((b * M + m[:, None]) * d + cols[None, :]), g.to(g_ptr.dtype.element_ty),
             mask=(m < M)[:, None] & (cols < d)[None, :])
    tl.store(count_ptr + (b * M + m), count, mask=(m < M) & (pid % tiles == 0))


@triton.jit
def _hard_assign_bwd_dots_kernel(g_ptr, dg_ptr, dots_ptr, R, d, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """dG_i . G_i of BLOCK_R groups, fp32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)                # (BLOCK_R,)
    dots = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, d, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        g = _tile(g_ptr, rows, d, R, cols, d).to(tl.float32)                              # (BLOCK_R, BLOCK_V)
        dots += tl.sum(g * _tile(dg_ptr, rows, d, R, cols, d).to(tl.float32), axis=1)
    tl.store(dots_ptr + rows, dots, mask=rows < R)


@triton.jit
def _hard_assign_bwd_dx_kernel(q_ptr, k_ptr, v_ptr, noise_ptr, count_ptr, dots_ptr, dg_ptr, dx_ptr, stride_qb, stride_q,
                               stride_kb, stride_k, stride_vb, stride_v, M, N, d, scale, tau, eps, seed,
                               NOISE: tl.constexpr, MP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: dX (B, N, M) of BLOCK_N patches of one image. Reads k and v once.

    A program holds all groups of its patches, so it makes the softmax anew: more accurate than e^(X / tau - lse).
    """
    pid, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    b, n = pid // tiles, pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, MP).to(tl.int64)
    z = tl.zeros((BLOCK_N, MP), tl.float32)
    da = tl.zeros((BLOCK_N, MP), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        k = _tile(k_ptr + b * stride_kb, n, stride_k, N, cols, d)                         # (BLOCK_N, BLOCK_D)
        q = _tile(q_ptr + b * stride_qb, m, stride_q, M, cols, d)                         # (MP, BLOCK_D)
        z = tl.dot(k, tl.trans(q), z, input_precision="ieee")
        v = _tile(v_ptr + b * stride_vb, n, stride_v, N, cols, d)                         # (BLOCK_N, BLOCK_D)
        dg = _tile(dg_ptr + b * M * d, m, d, M, cols, d)                                  # (MP, BLOCK_D)
        da = tl.dot(v, tl.trans(dg), da, input_precision="ieee")
    x = _logits(z, b, n, m, M, N, scale, seed, noise_ptr, NOISE)                          # (BLOCK_N, MP)
    a = tl.exp((x - tl.max(x, axis=1)[:, None]) / tau)
    a = a / tl.sum(a, axis=1)[:, None]
    dots = tl.load(dots_ptr + (b * M + m), mask=m < M, other=0.0)
    c = tl.load(count_ptr + (b * M + m), mask=m < M, other=1.0) + eps
    da = (da - dots[None, :]) / c[None, :]                    # 0 for m >= M
    dx = a * (da - tl.sum(a * da, axis=1)[:, None]) / tau
    tl.store(dx_ptr + ((b * N + n[:, None]) * M + m[None, :]), dx.to(dx_ptr.dtype.element_ty),
             mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _hard_assign_bwd_dkv_kernel(q_ptr, index_ptr, count_ptr, dg_ptr, dx_ptr, dk_ptr, dv_ptr, stride_qb, stride_q,
                                M, N, d, scale, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of dk, a product, and dv, a gather, of BLOCK_N patches. Writes dk and dv once."""
    pid, tiles, parts = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N), tl.cdiv(d, BLOCK_D)
    b, n = pid // parts // tiles, pid // parts % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = pid % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        dx = _tile(dx_ptr + b * N * M, n, M, N, m, M)                                     # (BLOCK_N, BLOCK_M)
        q = _tile(q_ptr + b * stride_qb, m, stride_q, M, cols, d)                         # (BLOCK_M, BLOCK_D)
        dk = tl.dot(dx, q, dk, input_precision="ieee")
    index = tl.load(index_ptr + (b * N + n), mask=n < N, other=0).to(tl.int64)
    c = tl.load(count_ptr + (b * M + index)) + eps                                        # (BLOCK_N,)
    dv = _tile(dg_ptr + b * M * d, index, d, M, cols, d).to(tl.float32) / c[:, None]      # (BLOCK_N, BLOCK_D)
    at, mask = (b * N + n[:, None]) * d + cols[None, :], (n < N)[:, None] & (cols < d)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hard_assign_bwd_dq_kernel(k_ptr, dx_ptr, dq_ptr, stride_kb, stride_k, M, N, d, scale, MP: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of dq of one image. Reads k and dX (B, N, M) once."""
    pid, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(d, BLOCK_D)
    b, cols = pid // tiles, pid % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.arange(0, MP).to(tl.int64)
    dq = tl.zeros((MP, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        dx = _tile(dx_ptr + b * N * M, n, M, N, m, M)                                     # (BLOCK_N, MP)
        k = _tile(k_ptr + b * stride_kb, n, stride_k, N, cols, d)                         # (BLOCK_N, BLOCK_D)
        dq = tl.dot(tl.trans(dx), k, dq, input_precision="ieee")
    tl.store(dq_ptr + ((b * M + m[:, None]) * d + cols[None, :]), (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=(m < M)[:, None] & (cols < d)[None, :])


# ------------------------------------------------------------------ autograd
def plan(M, d, itemsize, roomy=True):
    """Constants and options of the kernels whose programs own patches (forward, backward), columns, or both; None for
    M > 256. roomy: from sm_90 on, where there is more shared memory; these are the fastest of 54 each on an H200."""
    MP = max(16, 1 << (M - 1).bit_length())
    if MP > 256:
        return None
    if itemsize == 4:                                         # no matrix unit on NVIDIA: operands in registers
        patches = backward = (32, 16, 4, 1) if MP <= 64 else (16, 16, 4 if MP <= 128 else 16, 1)
        columns, both = (16, 32, 4 if MP <= 128 else 8, 1), (32, 64, 4, 1)
    elif roomy and d % 16 == 0:                               # loads of 16 bytes; 64 rows for wgmma
        patches = (64, 128, 8, 3) if MP <= 64 else (64, 64, 8, 4) if MP <= 128 else (32, 64, 8, 3)
        backward = (64, 64, 8, 3 if MP <= 64 else 4) if MP <= 128 else (32, 64, 8, 3)
        columns, both = (32, 128, 4 if MP <= 128 else 8, 4), (64, 128, 4, 3)
    else:
        patches = backward = (64, 64, 8, 3) if MP <= 64 else (64, 32, 8, 2) if MP <= 128 else (32, 32, 8, 2)
        columns, both = (64, 64, 4, 3) if MP <= 64 else (64, 64, 8, 2) if MP <= 128 else (32, 64, 8, 3), (64, 64, 8, 2)
    names = ("BLOCK_N", "BLOCK_D", "num_warps", "num_stages")
    patches, backward, columns, both = (dict(zip(names, values)) for values in (patches, backward, columns, both))
    both["BLOCK_M"] = min(MP, 16 if itemsize == 4 else 64)
    return {"MP": MP, **patches}, {"MP": MP, **backward}, {"MP": MP, **columns}, both


def _plan(q):
    roomy = torch.version.hip is None and (not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] >= 9)
    return plan(*q.shape[1:], q.element_size(), roomy)


def _empty(*shape, like, dtype=None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


class _HardAssign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tau, eps, seed, noise):
        q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
        (B, M, d), N, scale = q.shape, k.shape[1], q.shape[2] ** -0.5
        patches, _, columns, _ = _plan(q)
        kind = "tensor" if noise is not None else "none" if seed is None else "seed"
        index, lse = _empty(B, N, like=q, dtype=torch.int32), _empty(B, N, like=q, dtype=torch.float32)
        g, count = _empty(B, M, d, like=q), _empty(B, M, like=q, dtype=torch.float32)
        launch(_hard_assign_fwd_kernel, B * -(-N // patches["BLOCK_N"]), q, k, noise, index, lse, *q.stride()[:2],
               *k.stride()[:2], M, N, d, scale, tau, seed or 0, NOISE=kind, **patches)
        launch(_hard_assign_mean_kernel, B * -(-d // columns["BLOCK_D"]), v, index, g, count, *v.stride()[:2],
               M, N, d, eps, **columns)
        ctx.save_for_backward(q, k, v, noise, index, count, g)
        ctx.args = scale, tau, eps, seed or 0, kind
        ctx.mark_non_differentiable(index, count, lse)
        return g, index, count, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dg, *_):
        (q, k, v, noise, index, count, g), dg = ctx.saved_tensors, dg.contiguous()
        (B, M, d), N, (scale, tau, eps, seed, kind) = q.shape, k.shape[1], ctx.args
        _, patches, columns, both = _plan(q)
        block_r, block_v, warps = block_sizes(d)
        dots = _empty(B, M, like=q, dtype=torch.float32)
        launch(_hard_assign_bwd_dots_kernel, -(-B * M // block_r), g, dg, dots, B * M, d, BLOCK_R=block_r,
               BLOCK_V=block_v, num_warps=warps)
        dx, dk, dv = _empty(B, N, M, like=q), _empty(B, N, d, like=q), _empty(B, N, d, like=q)
        launch(_hard_assign_bwd_dx_kernel, B * -(-N // patches["BLOCK_N"]), q, k, v, noise, count, dots, dg, dx,
               *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], M, N, d, scale, tau, eps, seed, NOISE=kind,
               **patches)
        launch(_hard_assign_bwd_dkv_kernel, B * -(-N // both["BLOCK_N"]) * -(-d // both["BLOCK_D"]), q, index, count,
               dg, dx, dk, dv, *q.stride()[:2], M, N, d, scale, eps, **both)
        dq = _empty(B, M, d, like=q) if ctx.needs_input_grad[0] else None
        if dq is not None:
            launch(_hard_assign_bwd_dq_kernel, B * -(-d // columns["BLOCK_D"]), k, dx, dq, *k.stride()[:2], M, N, d,
                   scale, **columns)
        return dq, dk, dv, None, None, None, None


# ------------------------------------------------------------------ public function
def hard_assign(q, k, v, tau, eps, seed=None, noise=None, *, impl="auto"):
    """(G (B, M, d), index (B, N) int32, count (B, M), lse (B, N)) of q (B, M, d), k and v (B, N, d).

    seed: an int, for Gumbel noise; or noise: a tensor (B, M, N), a constant; neither in an evaluation.
    impl: "auto" (kernel on CUDA for M <= 256, else reference), "triton", "ref". Autocast changes nothing.
    Raises ValueError for wrong shapes, dtypes or devices, tau <= 0, eps < 0, a negative seed.
    """
    check(q.ndim == 3 and q.shape[1] >= 1 and q.shape[2] >= 1, f"q must be (B, M, d), got {tuple(q.shape)}")
    check(k.ndim == 3 and k.shape[::2] == q.shape[::2], f"k must be (B, N, d) with q's B and d, got {tuple(k.shape)}")
    check(v.shape == k.shape, f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    check(q.dtype in DTYPES + (torch.float64,) and q.dtype == k.dtype == v.dtype, "q, k, v must be of one float dtype")
    check(tau > 0 and eps >= 0, f"tau must be positive and eps not negative, got {tau} and {eps}")
    check(seed is None or noise is None, "give a seed or a noise tensor, not both")
    check(seed is None or 0 <= seed < 2 ** 63, f"seed must be in [0, 2**63), got {seed}")
    (B, M, _), N = q.shape, k.shape[1]
    check(noise is None or noise.shape == (B, M, N), f"noise must be {(B, M, N)}")
    check(all(x is None or x.device == q.device for x in (k, v, noise)), "all tensors must be on one device")
    fits = _plan(q) is not None
    with torch.autocast(q.device.type, enabled=False):
        if not use_triton(impl, q) or impl == "auto" and not fits or k.numel() == 0:
            return hard_assign_ref(q, k, v, tau, eps, seed, None if noise is None else noise.detach())
        check(fits, f"M = {M} is too large for the kernel")
        if INTERPRET and q.dtype == torch.bfloat16:           # which the interpreter cannot compute in
            g, *rest = hard_assign(q.float(), k.float(), v.float(), tau, eps, seed, noise, impl=impl)
            return g.bfloat16(), *rest
        noise = None if noise is None else noise.detach().float().contiguous()
        return _HardAssign.apply(q, k, v, float(tau), float(eps), seed, noise)


def rule(name, out, ref64, eager, n_reduce):
    """assert_kernel for each image, of which one in eight may fail: a patch on a tie that goes to another group
    changes two means, and through them all gradients of its image. Below eight images none may fail."""
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    failures = []
    for b in range(len(out)):
        try:
            assert_kernel(f"{name}, image {b}", out[b], ref64[b], eager[b], n_reduce)
        except AssertionError as failure:
            failures.append(failure)
    if len(failures) > len(out) // 8:
        raise failures[0]


# ------------------------------------------------------------------ compile cases and benchmark
MATMUL = "bf16"                                               # the unit whose peak counts
CHECK_SHAPES = [(3, 20, 100, 72, torch.float32), (2, 200, 130, 96, torch.float32), (2, 7, 50, 33, torch.float16),
                (4, 64, 576, 1024, torch.bfloat16), (2, 128, 576, 1024, torch.float16),
                (1, 256, 600, 512, torch.bfloat16)]           # B, M, N, d
BENCH_SHAPES = [(16, 64, 576, 1024, torch.bfloat16), (64, 192, 576, 1024, torch.bfloat16),
                (16, 64, 576, 1024, torch.float32)]


def floor(B, M, N, d, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs; also of each kernel."""
    groups, patches, work = B * M * d * itemsize, B * N * d * itemsize, B * M * N * d
    return {"forward": (2 * groups + 2 * patches + 4 * B * (2 * N + M), 2 * work + B * N * d),
            "backward": (4 * groups + 4 * patches, 8 * work),
            "forward assign": (groups + patches + 8 * B * N, 2 * work),
            "forward mean": (groups + patches + 4 * B * (N + M), B * N * d),
            "backward dots": (2 * groups + 4 * B * M, 2 * B * M * d),
            "backward dx": (2 * groups + 2 * patches + B * M * N * itemsize, 4 * work),
            "backward dkv": (2 * groups + 2 * patches + B * M * N * itemsize, 2 * work),
            "backward dq": (groups + patches + B * M * N * itemsize, 2 * work)}


def _aot_cases(dtype, M, N, d, noise, roomy):
    patches, backward, columns, both = plan(M, d, 4 if dtype == "fp32" else 2, roomy)
    block_r, block_v, warps = block_sizes(d)
    rows = dict(BLOCK_R=block_r, BLOCK_V=block_v, num_warps=warps)
    sizes = {"M": M, "N": N, "d": d}
    inputs = {f"stride_{x}": y for x, y in (("qb", M * d), ("q", d), ("kb", N * d), ("k", d), ("vb", N * d), ("v", d))}
    inputs |= {**sizes, "R": "i32", **dict.fromkeys(("scale", "tau", "eps"), "fp32"), "seed": "i32"}
    inputs |= dict.fromkeys((f"{x}_ptr" for x in ("q", "k", "v", "g", "dg", "dx", "dq", "dk", "dv")), f"*{dtype}")
    inputs |= {"index_ptr": "*i32", **dict.fromkeys(("count_ptr", "lse_ptr", "dots_ptr", "noise_ptr"), "*fp32")}
    noisy = {"NOISE": noise, **({} if noise == "tensor" else {"noise_ptr": None})}
    kernels = ((_hard_assign_fwd_kernel, "forward assign", {**patches, **noisy}),
               (_hard_assign_mean_kernel, "forward mean", columns),
               (_hard_assign_bwd_dots_kernel, "backward dots", rows),
               (_hard_assign_bwd_dx_kernel, "backward dx", {**backward, **noisy}),
               (_hard_assign_bwd_dkv_kernel, "backward dkv", both),
               (_hard_assign_bwd_dq_kernel, "backward dq", columns))
    cases = []
    for kernel, mode, constants in kernels:
        options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
        constants = {name: value for name, value in constants.items() if name not in options}
        arguments = {name: kind for name, kind in inputs.items() if name in kernel.arg_names and name not in constants}
        cases.append(aot_case(kernel, mode, dtype, (M, N, d), arguments, options, **constants))
    return cases


AOT_SHAPES = [("fp32", 64, 576, 1024, "none"), ("bf16", 64, 576, 1024, "seed"), ("fp16", 128, 577, 1000, "tensor"),
              ("bf16", 256, 576, 1024, "none")]
AOT_CASES = [roomy | dict.fromkeys(("sm_80", "gfx942"), small) for shape in AOT_SHAPES
             for roomy, small in zip(_aot_cases(*shape, True), _aot_cases(*shape, False))] if HAS_TRITON else []


def example(B, M, N, d, dtype, device):
    """Arguments (q, k, v, tau, eps, seed) for checks and benchmarks. q and k hold multiples of 1/2, so that the sums
    q . k are exact in every dtype and order, and all implementations choose the same groups."""
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-4, 5, (B, n, d), generator=gen) / 2 for n in (M, N))
    v = torch.randn(B, N, d, generator=gen) + 1
    return *(x.to(device=device, dtype=dtype) for x in (q, k, v)), 0.9, 1.0, 7


def outputs(fn, args):
    """{name: tensor} to compare between implementations: all outputs and gradients; dG is the same in every dtype."""
    inputs = [x.detach().requires_grad_() for x in args[:3]]
    g, index, count, lse = fn(*inputs, *args[3:])
    dg = torch.randint(-4, 5, g.shape, generator=torch.Generator().manual_seed(1)) / 4
    grads = torch.autograd.grad(g, inputs, dg.to(g))
    return {"G": g.detach(), "index": index, "count": count, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads))


def kernel(*args):
    return hard_assign(*args, impl="triton")


reference = hard_assign_ref


def usual(q, k, v, tau, eps, seed=None):
    """What a script does without the kernel: matmuls in the dtype of q, noise from PyTorch's generator, no lse."""
    hard = F.gumbel_softmax((q @ k.mT).float() * q.shape[-1] ** -0.5, tau, hard=True, dim=1)           # (B, M, N)
    return (hard.to(v.dtype) @ v / (hard.sum(2, keepdim=True) + eps)).to(v.dtype), hard.sum(2).detach()


def bench(args):
    """{mode: {provider: thunk}}; a backward thunk repeats one graph's backward, to q, k and v."""
    fns = {"kernel": kernel, "eager": usual, "torch.compile": torch.compile(usual)}
    forward = {name: torch.no_grad()(lambda fn=fn: fn(*args)) for name, fn in fns.items()}
    inputs = [x.requires_grad_() for x in args[:3]]
    graphs = {name: fn(*args)[0] for name, fn in fns.items()}
    dg = torch.ones_like(args[0])
    backward = {name: lambda g=g: torch.autograd.grad(g, inputs, dg, retain_graph=True) for name, g in graphs.items()}
    return {"forward": forward, "backward": backward}
