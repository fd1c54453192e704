# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Attention scores as a feature map, convolved along the keys (DAPE V2: Zheng et al. 2024, arXiv 2410.04798).

    X = [s, r[i - j]], 0 for j > i                       2H channels, H without r; the tril BEFORE the convolution
    G = leaky_relu(conv1(X) + b1)                        W channels, hidden columns 0 ... i + p of row i, p = k // 2
    A = s + r[i - j] + conv2(G) + b2, -inf for j > i     both convolutions 1 x k: no row sees another one

Shapes: s (B, H, M, N), scaled scores of the query rows i = row0 ... row0 + M - 1 and the keys j = 0 ... N - 1,
N >= row0 + M; r (H, T), a bias by distance t = i - j, T >= row0 + M, or None; w1 (W, 2H or H, k), scores first,
b1 (W,), w2 (H, W, k), b2 (H,), k odd. Returns A (B, H, M, N) in the type of s: fp32, fp16, bf16, fp64 (reference).
Edges: hidden columns before 0 are zero. The p hidden columns behind the diagonal exist in every row, read legal
scores only, and conv2 reads them: so no row depends on how many rows or columns the tensor has after it.
Scores with j > i are never looked at. Rounded to the type of s, here and in the reference: the scores' part of w1,
w2 and G, the operands of the products (and dHid, the gradient of conv1(X) + b1). All the rest is fp32.

The kernels know nothing of r. A bias of the distance alone stays one under conv1, but for the columns j < p, where
the left edge cuts taps off. PyTorch makes two tables of it, and autograd takes their gradients on to r, w1, b1, b2:
    table[c, t] = b1 + sum_{h, e >= -c} w1[:, H + h, e + p] r[h, t - e]     for column c < p, and c = p for the others
    bias[t]     = r[:, t] + b2                                             r[:, t] = 0 for t < 0; t = -p ... T - 1

No races: an output element is written by one program, and no program reads what its launch writes. No atomics:
sums over rows (weights, tables) are written in parts, a slice for each program, and added up by PyTorch.

Floor, L = sum_i (i + 1) the legal columns of all rows, b bytes an element, times B: forward H (L + M N) b bytes and
4 H W k L FLOPs; backward H (2 L + M N) b bytes and 10 H W k L FLOPs. The kernels pad H, W and k to powers of two and,
rather than keep the hidden layer, compute it again for each tap of the other convolution: (2 k + 2) H W k L FLOPs
forward, (4 k + 2) H W k L for dS, 8 H W k L for the weights, in padded sizes.
"""
import torch
import torch.nn.functional as F

from kernels._common import DTYPES, INTERPRET, aot_case, assert_kernel, check, last_dim_contiguous, launch
from kernels._common import tl, triton, use_triton


# ------------------------------------------------------------------ reference
def score_conv_ref(s, r, w1, b1, w2, b2, row0=0, slope=0.01):
    """Plain PyTorch, in fp32 (fp64 for fp64 s); the CPU path."""
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32

    def rounded(t):
        return t.to(s.dtype).to(wide)

    H, (M, N), p = s.shape[1], s.shape[2:], w2.shape[-1] // 2
    distance = torch.arange(row0, row0 + M, device=s.device)[:, None] - torch.arange(N, device=s.device)   # (M, N)
    x = total = s.to(wide)                                                                # (B, H, M, N)
    if r is not None:
        bias = r.to(wide)[:, distance.clamp(min=0)]                                       # (H, M, N)
        x, total = torch.cat([total, bias.expand_as(total)], 1), total + bias
    x = F.pad(x.masked_fill(distance < 0, 0), (p, 2 * p))
    w1 = torch.cat([rounded(w1[:, :H]), w1[:, H:].to(wide)], 1)
    g = F.leaky_relu(F.conv2d(x, w1[:, :, None], b1.to(wide)), slope)                     # (B, W, M, N + p)
    f = F.conv2d(F.pad(rounded(g), (p, 0)), rounded(w2)[:, :, None], b2.to(wide))         # (B, H, M, N)
    return (total + f).masked_fill(distance < 0, -float("inf")).to(s.dtype)


# ------------------------------------------------------------------ tables and weights as the kernels read them
def sizes(H, W, k):
    """Heads, width and taps, padded: powers of two, and no side of a product below 16."""
    heads, width, taps = (1 << (n - 1).bit_length() for n in (H, W, k))
    return max(16, heads), max(16, width), taps


def tables(r, w1, b1, b2, T, k):
    """table (p + 1, T + p, WP) and bias (T, HP) of the docstring, in the type of b1, zeros for padding."""
    H, W, p = len(b2), len(b1), k // 2
    table, bias = b1.expand(p + 1, T + p, W), b2.expand(T, H)
    if r is not None:
        tap = torch.arange(k, device=r.device)                                            # tap = p - e
        w = w1[:, H:].flip(-1) * (tap <= p + torch.arange(p + 1, device=r.device)[:, None])[:, None, None]
        windows = F.pad(r[:, :T], (2 * p, p)).unfold(1, k, 1)                             # (H, T + p, k): r[h, t - e]
        table, bias = table + torch.einsum("cwhk,htk->ctw", w, windows), bias + r[:, :T].T
    heads, width, _ = sizes(H, W, k)
    return F.pad(table, (0, width - W)), F.pad(bias, (0, heads - H))


def taps_first(w):
    """Weights (H, W, k) of one convolution as (TAPS * HP, WP): row tap * HP + h, zeros for padding."""
    H, W, k = w.shape
    heads, width, taps = sizes(H, W, k)
    return F.pad(w.permute(2, 0, 1), (0, width - W, 0, heads - H, 0, taps - k)).flatten(0, 1)


# ------------------------------------------------------------------ kernels
@triton.jit
def _tile(M, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Batch element, first row and first column of this program's ROWS x COLS part of (M, N)."""
    pid = tl.program_id(0).to(tl.int64)
    parts_m, parts_n = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    return pid // (parts_n * parts_m), pid // parts_n % parts_m * ROWS, pid % parts_n * COLS


@triton.jit
def _pixels(first_m, end_m, row0, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's pixels, row by row: row m of the tensor, row i of the scores, column in the tile. Rows from end_m on
    have an i at which nothing exists, not even a hidden column."""
    lane = tl.arange(0, BLOCK_M * BLOCK_N).to(tl.int64)
    m = first_m + lane // BLOCK_N
    return m, tl.where(m < end_m, row0 + m, -K), lane % BLOCK_N


@triton.jit
def _matrix(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """All of a (ROWS, COLS) array."""
    return tl.load(ptr + (tl.arange(0, ROWS).to(tl.int64)[:, None] * COLS + tl.arange(0, COLS)[None, :]))


@triton.jit
def _tap(ptr, tap, HP: tl.constexpr, WP: tl.constexpr):
    """(WP, HP): the weights of one tap, transposed."""
    return tl.load(ptr + (tl.arange(0, WP).to(tl.int64)[:, None] + (tap * HP + tl.arange(0, HP))[None, :] * WP))


@triton.jit
def _neighbours(ptr, row, stride_h, i, cols, SIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
                HP: tl.constexpr, TAPS: tl.constexpr):
    """(pixels, TAPS * HP): all heads of the columns cols + SIGN * (tap - p), 0 where there is none or it is in the
    future: the mask col <= i is the tril. K = TAPS = 1: of the columns alone."""
    lane = tl.arange(0, TAPS * HP).to(tl.int64)[None, :]
    head, tap = lane % HP, lane // HP
    col = cols[:, None] + SIGN * (tap - K // 2)
    mask = (head < H) & (tap < K) & (col >= 0) & (col <= i[:, None])
    return tl.load(ptr + (row[:, None] + head * stride_h + col), mask=mask, other=0.0)


@triton.jit
def _hidden(x, w1, table_ptr, i, cols, T, K: tl.constexpr, WP: tl.constexpr):
    """conv1(X) + b1 (pixels, WP) from the neighbours x, and whether the rows have these hidden columns."""
    exists = ((cols >= 0) & (cols <= i + K // 2))[:, None]
    row = tl.minimum(cols, K // 2) * (T + K // 2) + (i - cols + K // 2)
    table = tl.load(table_ptr + (row[:, None] * WP + tl.arange(0, WP)[None, :]), mask=exists, other=0.0)
    return tl.dot(x, w1, table, input_precision="ieee"), exists


@triton.jit
def _leaky(hidden, y, exists, slope):
    """y or slope * y by the sign of the hidden value: G for y = hidden, dHid for y = dG."""
    return tl.where(exists, tl.where(hidden > 0, y, y * slope), 0.0)


@triton.jit
def _score_conv_fwd_kernel(s_ptr, table_ptr, bias_ptr, w1_ptr, w2_ptr, a_ptr, stride_b, stride_h, stride_m, M, N,
                           row0, slope, H: tl.constexpr, K: tl.constexpr, HP: tl.constexpr, WP: tl.constexpr,
                           TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_M rows and BLOCK_N columns of one batch element, all heads. Above the diagonal -inf only."""
    b, first_m, first = _tile(M, N, BLOCK_M, BLOCK_N)
    m, i, cols = _pixels(first_m, M, row0, K, BLOCK_M, BLOCK_N)
    cols += first
    head = tl.arange(0, HP).to(tl.int64)[None, :]
    a = tl.full((BLOCK_M * BLOCK_N, HP), -float("inf"), tl.float32)
    if first < row0 + first_m + BLOCK_M:
        row, w1 = b * stride_b + m * stride_m, _matrix(w1_ptr, TAPS * HP, WP)
        f = tl.zeros((BLOCK_M * BLOCK_N, HP), tl.float32)
        for tap in range(K):
            near = cols + (tap - K // 2)                      # hidden columns
            x = _neighbours(s_ptr, row, stride_h, i, near, 1, H, K, HP, TAPS)
            hidden, exists = _hidden(x, w1, table_ptr, i, near, row0 + M, K, WP)
            g = _leaky(hidden, hidden, exists, slope).to(x.dtype)
            f = tl.dot(g, _tap(w2_ptr, tap, HP, WP), f, input_precision="ieee")
        legal = (cols <= i)[:, None]
        bias = tl.load(bias_ptr + ((i - cols)[:, None] * HP + head), mask=legal, other=0.0)
        s = _neighbours(s_ptr, row, stride_h, i, cols, 1, H, 1, HP, 1).to(tl.float32)
        a = tl.where(legal, s + bias + f, a)
    tl.store(a_ptr + (((b * H + head) * M + m[:, None]) * N + cols[:, None]), a.to(a_ptr.dtype.element_ty),
             mask=(head < H) & ((m < M) & (cols < N))[:, None])


@triton.jit
def _score_conv_bwd_ds_kernel(s_ptr, da_ptr, table_ptr, w1_ptr, w2_ptr, ds_ptr, stride_b, stride_h, stride_m,
                              stride_da, M, N, row0, slope, H: tl.constexpr, K: tl.constexpr, HP: tl.constexpr,
                              WP: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dS (contiguous), programs as in the forward: dS[j] = dA[j] + sum_e W1_e^T dHid[j - e], 0 for j > i.

    dHid[c] = leaky'(Hid[c]) sum_e W2_e^T dA[c - e]; the extension columns are among the c = j - e.
    """
    b, first_m, first = _tile(M, N, BLOCK_M, BLOCK_N)
    m, i, cols = _pixels(first_m, M, row0, K, BLOCK_M, BLOCK_N)
    cols += first
    ds = tl.zeros((BLOCK_M * BLOCK_N, HP), tl.float32)
    if first < row0 + first_m + BLOCK_M:
        row, w1 = b * stride_b + m * stride_m, _matrix(w1_ptr, TAPS * HP, WP)
        row_da, w2 = (b * H * M + m) * N, _matrix(w2_ptr, TAPS * HP, WP)
        for tap in range(K):
            near = cols - (tap - K // 2)                      # hidden columns
            x = _neighbours(s_ptr, row, stride_h, i, near, 1, H, K, HP, TAPS)
            da = _neighbours(da_ptr, row_da, stride_da, i, near, -1, H, K, HP, TAPS)
            hidden, exists = _hidden(x, w1, table_ptr, i, near, row0 + M, K, WP)
            dhidden = _leaky(hidden, tl.dot(da, w2, input_precision="ieee"), exists, slope)
            ds = tl.dot(dhidden.to(x.dtype), _tap(w1_ptr, tap, HP, WP), ds, input_precision="ieee")
        da = _neighbours(da_ptr, row_da, stride_da, i, cols, 1, H, 1, HP, 1).to(tl.float32)
        ds = tl.where((cols <= i)[:, None], da + ds, 0.0)
    head = tl.arange(0, HP).to(tl.int64)[None, :]
    tl.store(ds_ptr + (((b * H + head) * M + m[:, None]) * N + cols[:, None]), ds.to(ds_ptr.dtype.element_ty),
             mask=(head < H) & ((m < M) & (cols < N))[:, None])


@triton.jit
def _score_conv_bwd_dw_kernel(s_ptr, da_ptr, table_ptr, w1_ptr, w2_ptr, dtable_ptr, dedge_ptr, dbias_ptr, dw_ptr,
                              stride_b, stride_h, stride_m, stride_da, M, N, row0, slope, H: tl.constexpr,
                              K: tl.constexpr, HP: tl.constexpr, WP: tl.constexpr, TAPS: tl.constexpr,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr):
    """Parts of the gradients of weights and tables. One program: PART rows, BLOCK_M at a time, and in each row the
    BLOCK_N hidden columns at the same distances t = i - column. A column's distance grows by one with the row, so
    the tables' gradients are sums of tiles that need no shift. The distances start at -p: the extension columns.
    Columns from p on are summed up in dtable; the p others, one row each, are stored in dedge (B, p, M, WP).
    """
    n_t = row0 + M + K // 2                                   # distances -p ... row0 + M - 1
    b, first_m, first = _tile(M, n_t, PART, BLOCK_N)
    last_t = first + BLOCK_N - 1 - K // 2                     # the distance of the tile's first column
    end_m = tl.minimum(first_m + PART, M)
    head = tl.arange(0, HP).to(tl.int64)[None, :]
    width = tl.arange(0, WP).to(tl.int64)[None, :]
    w1 = _matrix(w1_ptr, TAPS * HP, WP)
    w2 = _matrix(w2_ptr, TAPS * HP, WP)
    dw1 = tl.zeros((TAPS * HP, WP), tl.float32)
    dw2 = tl.zeros((TAPS * HP, WP), tl.float32)
    dtable = tl.zeros((BLOCK_M * BLOCK_N, WP), tl.float32)
    dbias = tl.zeros((BLOCK_M * BLOCK_N, HP), tl.float32)
    for start in range(tl.maximum(first_m, first - K // 2 - row0), end_m, BLOCK_M):       # rows before: too short
        m, i, lane = _pixels(start, end_m, row0, K, BLOCK_M, BLOCK_N)
        cols = i - last_t + lane                              # ascending, for neighbouring addresses
        row_da = (b * H * M + m) * N
        x = _neighbours(s_ptr, b * stride_b + m * stride_m, stride_h, i, cols, 1, H, K, HP, TAPS)
        da = _neighbours(da_ptr, row_da, stride_da, i, cols, -1, H, K, HP, TAPS)
        hidden, exists = _hidden(x, w1, table_ptr, i, cols, row0 + M, K, WP)
        g = _leaky(hidden, hidden, exists, slope)
        dhidden = _leaky(hidden, tl.dot(da, w2, input_precision="ieee"), exists, slope)
        dw1 = tl.dot(tl.trans(x), dhidden.to(x.dtype), dw1, input_precision="ieee")
        dw2 = tl.dot(tl.trans(da), g.to(x.dtype), dw2, input_precision="ieee")
        dtable += tl.where((cols >= K // 2)[:, None], dhidden, 0.0)
        dbias += _neighbours(da_ptr, row_da, stride_da, i, cols, 1, H, 1, HP, 1).to(tl.float32)
        if row0 + start - last_t < K // 2:                    # the first columns of all are in this tile
            edge = ((cols >= 0) & (cols < K // 2))[:, None]
            at = ((b * (K // 2) + cols) * M + m)[:, None] * WP + width
            tl.store(dedge_ptr + at, dhidden, mask=edge)
    row = (first + BLOCK_N - 1 - tl.arange(0, BLOCK_N))[:, None]                          # t + p
    part = tl.program_id(0).to(tl.int64) // tl.cdiv(n_t, BLOCK_N) * n_t
    dtable = tl.sum(tl.reshape(dtable, (BLOCK_M, BLOCK_N, WP)), axis=0)
    dbias = tl.sum(tl.reshape(dbias, (BLOCK_M, BLOCK_N, HP)), axis=0)
    tl.store(dtable_ptr + ((part + row) * WP + width), dtable, mask=row < n_t)
    tl.store(dbias_ptr + ((part + row) * HP + head), dbias, mask=row < n_t)
    at = (tl.program_id(0).to(tl.int64) * (2 * TAPS * HP) + tl.arange(0, TAPS * HP))[:, None] * WP + width
    tl.store(dw_ptr + at, dw1)
    tl.store(dw_ptr + (TAPS * HP * WP + at), dw2)


# ------------------------------------------------------------------ autograd
def plan(H, W, k, itemsize):
    """Constants of the kernels, rows of a part, options; or None where weights and sums do not fit the registers.
    The kernel of the weights' gradients takes at most 32 columns: with 64 and 4 warps, ptxas 12.8 (triton 3.6, 3.7)
    made code for sm_90 that reads a register before it is written, and the gradients were wrong on an H200."""
    HP, WP, TAPS = sizes(H, W, k)
    if HP * WP * TAPS > (4096 if itemsize == 2 else 2048):
        return None
    columns, warps = (16, 8) if itemsize == 4 else (64, 4) if HP * WP * TAPS <= 2048 and WP <= 32 else (32, 4)
    constants = dict(H=H, K=k, HP=HP, WP=WP, TAPS=TAPS, BLOCK_M=1, BLOCK_N=columns)
    return constants, 128, {"num_warps": warps, "num_stages": 1}


class _ScoreConv(torch.autograd.Function):
    """Of scores, tables and packed weights (fp32); PyTorch differentiates what comes before them."""

    @staticmethod
    def forward(ctx, s, table, bias, w1, w2, shape, row0, slope):
        s, table, bias = last_dim_contiguous(s), table.contiguous(), bias.contiguous()
        w1, w2 = w1.to(s.dtype).contiguous(), w2.to(s.dtype).contiguous()
        (B, H, M, N), (constants, _, options) = s.shape, plan(*shape, s.element_size())
        a = torch.empty((B, H, M, N), dtype=s.dtype, device=s.device)
        launch(_score_conv_fwd_kernel, _programs(s, constants), s, table, bias, w1, w2, a, *s.stride()[:3], M, N,
               row0, slope, **constants, **options)
        ctx.save_for_backward(s, table, w1, w2)
        ctx.args = shape, row0, slope
        return a

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, da):
        (s, table, w1, w2), (shape, row0, slope), da = ctx.saved_tensors, ctx.args, da.contiguous()
        (B, _, M, N), p, (T, WP) = s.shape, len(table) - 1, table.shape[1:]               # T: with p in front
        constants, part, options = plan(*shape, s.element_size())
        args = (*s.stride()[:3], M * N, M, N, row0, slope)
        ds, others = None, [None] * 4
        if ctx.needs_input_grad[0]:
            ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
            launch(_score_conv_bwd_ds_kernel, _programs(s, constants), s, da, table, w1, w2, ds, *args,
                   **constants, **options)
        if any(ctx.needs_input_grad[1:5]):
            constants |= {"BLOCK_N": min(constants["BLOCK_N"], 32)}                       # see plan
            parts, n = B * -(-M // part), B * -(-M // part) * -(-T // constants["BLOCK_N"])
            shapes = (parts, T, WP), (B, p, M, WP), (parts, T, constants["HP"]), (n, 2, *w1.shape)
            sums = [torch.empty(shape, dtype=torch.float32, device=s.device) for shape in shapes]
            launch(_score_conv_bwd_dw_kernel, n, s, da, table, w1, w2, *sums, *args, **constants, **options, PART=part)
            dtable, edge, dbias, (dw1, dw2) = (x.sum(0) for x in sums)
            dtable = torch.cat([torch.zeros_like(table[:p]), dtable[None]])
            for column in range(p):                           # row m is at distance row0 + m - column
                dtable[column, row0 + p - column:][:M] = edge[column]
            others = [dtable, dbias[p:], dw1, dw2]
        return ds, *others, None, None, None


def _programs(s, constants):
    """Tiles of all batch elements."""
    return len(s) * -(-s.shape[2] // constants["BLOCK_M"]) * -(-s.shape[3] // constants["BLOCK_N"])


# ------------------------------------------------------------------ public function
def score_conv(s, r, w1, b1, w2, b2, row0=0, slope=0.01, impl="auto"):
    """A (B, H, M, N) in the type of s, from scores s (B, H, M, N) of the rows from row0 on, bias r (H, T) or None,
    w1 (W, 2H or H, k), b1 (W,), w2 (H, W, k), b2 (H,). Gradients to all tensors. Autocast changes nothing.

    impl: "auto" (kernel on CUDA unless H, W and k are too large for it, else reference), "triton", "ref".
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    check(s.ndim == 4, f"s must be (B, H, M, N), got {tuple(s.shape)}")
    (_, H, M, N), given = s.shape, [s, w1, b1, w2, b2] + ([] if r is None else [r])
    check(w2.ndim == 3 and len(w2) == H >= 1, f"w2 must be ({H}, W, k), got {tuple(w2.shape)}")
    (W, k), channels = w2.shape[1:], H if r is None else 2 * H
    check(W >= 1 and k % 2 == 1, f"W must be at least 1 and k odd, got {W} and {k}")
    check(w1.shape == (W, channels, k), f"w1 must be {(W, channels, k)}, got {tuple(w1.shape)}")
    check(b1.shape == (W,) and b2.shape == (H,), f"b1 must be ({W},) and b2 ({H},)")
    check(row0 >= 0 and N >= row0 + M, f"{M} rows from {row0} on reach beyond {N} columns")
    check(r is None or r.ndim == 2 and len(r) == H and r.shape[1] >= row0 + M, f"r must be ({H}, {row0 + M} or more)")
    check(all(x.dtype in DTYPES + (torch.float64,) for x in given), "all tensors must be floating point")
    check(all(x.device == s.device for x in given), "all tensors must be on one device")
    fits = plan(H, W, k, s.element_size()) is not None
    with torch.autocast(s.device.type, enabled=False):        # the type of s decides, and the tables stay fp32
        if s.numel() == 0:
            return s.clone()
        if not use_triton(impl, s) or impl == "auto" and not fits:
            return score_conv_ref(s, r, w1, b1, w2, b2, row0, slope)
        check(fits, f"H = {H}, W = {W}, k = {k} are too large for the kernel")
        if INTERPRET and s.dtype == torch.bfloat16:           # which the interpreter cannot compute in
            return score_conv(s.float(), r, w1, b1, w2, b2, row0, slope, impl).bfloat16()
        r, w1, b1, w2, b2 = (None if x is None else x.float() for x in (r, w1, b1, w2, b2))
        weights = taps_first(w1[:, :H].transpose(0, 1)), taps_first(w2)
        return _ScoreConv.apply(s, *tables(r, w1, b1, b2, row0 + M, k), *weights, (H, W, k), row0, float(slope))


def rule(name, out, ref64, eager, n_reduce):
    """assert_kernel for fp32, and -inf in the same places. In 16 bits a rounded weight can turn the sign of a hidden
    value, and with it a gradient, so the mean square has no fixed limit there: it and the maximum may be off by
    twice the error of plain PyTorch in the same dtype + 1 ulp of themselves."""
    legal = ref64 != -float("inf")
    assert torch.equal(out != -float("inf"), legal), f"{name}: -inf in other places"
    out, ref64, eager = out[legal], ref64[legal], eager[legal]
    if out.dtype == torch.float32 or out.numel() == 0:
        return assert_kernel(name, out, ref64, eager, n_reduce)
    assert torch.isfinite(out).all(), f"{name}: not finite"
    error, plain, ulp = (out.double() - ref64).abs(), (eager.double() - ref64).abs(), torch.finfo(out.dtype).eps
    for what, size in (("max", torch.max), ("RMS", lambda x: x.square().mean().sqrt())):
        found, limit = size(error), 2 * size(plain) + ulp * size(ref64.abs())
        assert found <= limit, f"{name}: {what} error {found:.1e}, allowed {limit:.1e}"


# ------------------------------------------------------------------ compile cases and benchmark
MATMUL = "bf16"                                               # the unit whose peak counts
# (B, H, M, N, W, k) and dtype; the rows are the last M of N
CHECK_SHAPES = [(2, 12, 70, 200, 32, 3, torch.float32), (2, 12, 300, 300, 32, 3, torch.bfloat16),
                (1, 4, 33, 100, 16, 5, torch.float16), (3, 16, 100, 100, 32, 1, torch.float16)]
BENCH_SHAPES = [(32, 12, 512, 512, 32, 3, torch.bfloat16), (1, 12, 4096, 4096, 32, 3, torch.bfloat16),
                (32, 12, 512, 512, 32, 1, torch.bfloat16), (4, 12, 512, 512, 32, 3, torch.float32)]


def floor(B, H, M, N, W, k, itemsize):
    """{mode: (bytes, FLOPs)} that any implementation needs; also of each kernel of the backward."""
    legal, all_ = B * H * (M * (N - M) + M * (M + 1) // 2), B * H * M * N
    return {"forward": ((legal + all_) * itemsize, 4 * W * k * legal),
            "backward": ((2 * legal + all_) * itemsize, 10 * W * k * legal),
            "backward ds": ((2 * legal + all_) * itemsize, 6 * W * k * legal),
            "backward dw": (2 * legal * itemsize, 8 * W * k * legal)}


def _aot_cases(dtype, H, M, N, W, k):
    constants, part, options = plan(H, W, k, 4 if dtype == "fp32" else 2)
    inputs = dict.fromkeys(("s_ptr", "w1_ptr", "w2_ptr"), f"*{dtype}") | {"table_ptr": "*fp32", "slope": "fp32"}
    inputs |= {"stride_b": H * M * N, "stride_h": M * N, "stride_m": N, "M": M, "N": N, "row0": N - M}
    backward = {**inputs, "da_ptr": f"*{dtype}", "stride_da": M * N}
    sums = dict.fromkeys(("dtable_ptr", "dedge_ptr", "dbias_ptr", "dw_ptr"), "*fp32")
    kernels = ((_score_conv_fwd_kernel, "forward", inputs | {"bias_ptr": "*fp32", "a_ptr": f"*{dtype}"}, {}),
               (_score_conv_bwd_ds_kernel, "backward ds", backward | {"ds_ptr": f"*{dtype}"}, {}),
               (_score_conv_bwd_dw_kernel, "backward dw", backward | sums,
                {"PART": part, "BLOCK_N": min(constants["BLOCK_N"], 32)}))
    return [aot_case(kernel, mode, dtype, (H, M, N, W, k), arguments, options, **(constants | extra))
            for kernel, mode, arguments, extra in kernels]


AOT_CASES = [case for shape in (("fp32", 12, 512, 512, 32, 3), ("fp16", 4, 256, 8192, 16, 5),
                                ("bf16", 12, 512, 512, 32, 3)) for case in _aot_cases(*shape)]


def example(B, H, M, N, W, k, dtype, device, bias=True):
    """Arguments (s, r, w1, b1, w2, b2, row0) for checks and benchmarks; weights and bias are fp32."""
    gen, channels = torch.Generator().manual_seed(0), 2 * H if bias else H
    shapes = (B, H, M, N), (H, N), (W, channels, k), (W,), (H, W, k), (H,)
    s, r, w1, b1, w2, b2 = (torch.randn(shape, generator=gen).to(device) for shape in shapes)
    w1, w2 = w1 / (channels * k) ** 0.5, w2 / (W * k) ** 0.5
    return s.to(dtype), r if bias else None, w1, b1, w2, b2, N - M


def outputs(fn, args):
    """{name: tensor} to compare between implementations: A and all gradients, in the type of s: sums of products
    of 16-bit numbers are no better than those. The upstream gradient is the same number in every type."""
    args = [x.detach().requires_grad_() if torch.is_tensor(x) else x for x in args]
    inputs = {name: x for name, x in zip(("s", "r", "w1", "b1", "w2", "b2"), args) if x is not None}
    a = fn(*args)
    da = torch.randint(-4, 5, a.shape, generator=torch.Generator().manual_seed(1)) / 4
    grads = torch.autograd.grad(a, list(inputs.values()), da.to(a))
    return {"a": a.detach()} | {f"d{name}": grad.to(a.dtype) for name, grad in zip(inputs, grads)}


def kernel(*args):
    return score_conv(*args, impl="triton")


reference = score_conv_ref


def bench(args):
    """{mode: {provider: thunk}}; a backward thunk repeats one graph's backward, to all inputs."""
    fns = {"kernel": kernel, "eager": reference, "torch.compile": torch.compile(reference)}
    forward = {name: torch.no_grad()(lambda fn=fn: fn(*args)) for name, fn in fns.items()}
    inputs = [x.requires_grad_() for x in args if torch.is_tensor(x)]
    graphs, da = {name: fn(*args) for name, fn in fns.items()}, torch.ones_like(args[0])
    backward = {name: lambda a=a: torch.autograd.grad(a, inputs, da, retain_graph=True) for name, a in graphs.items()}
    return {"forward": forward, "backward": backward}
