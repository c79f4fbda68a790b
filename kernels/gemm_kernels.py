"""The kernels of `gemm` and `gated_gemm`: y = act(x @ w.T), or act(x @ w.T) * (x @ up.T), and what is added to it.

    vector   M = 1. CUDA cores. A program owns a few rows of w; K is spread over its threads: no sum crosses programs.
    decode   M <= 128. w is the left operand of the tensor cores, which want 64 rows there, and the few tokens are the
             right one, which may have 16. K may be split over programs, so that all multiprocessors get equal work.
    prefill  Persistent: each program takes tile after tile; operands come and y goes by TMA. From sm_90 on.

vector and decode take as long as w takes to be read. A launch is short (10 us), so its start and its end count: the
first columns of w are on their way to L2 while the kernel before still runs (see `target.has_pdl`), and what programs
that share a tile leave behind is summed in the same launch, by the last of them to arrive, in the order of K: the same
bits whoever is last.

All accumulate in fp32 and round once, at the store. What is counted from the start of a tensor has 64 bits. What
optional operands that are None concern is not compiled: bias, residual, and up, which makes a GEMM a gated one.

Grouped tile order, the persistent loop and the tile that is stored in parts follow Triton's tutorials 03 and 09.
Nothing here has met a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .target import prefetch_l2


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # gelu_tanh: 1 + tanh(u) = 2 / (1 + exp(-2 u))
        return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _bias_act(acc, up, bias_ptr, offs_n, N, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """A tile after bias, activation and product with `up`, which counts if gated: fp32, as `acc`."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        acc *= up
    return acc


@triton.jit
def _store_by_pointer(
    acc, up, bias_ptr, residual_ptr, y_ptr, stride_rm, stride_ym, offs_m, offs_n, M, N,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What is left to do for a tile after the sum over K."""
    y = _bias_act(acc, up, bias_ptr, offs_n, N, ACTIVATION, GATED)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if residual_ptr is not None:
        offs = offs_m.to(tl.int64)[:, None] * stride_rm + offs_n[None, :]
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_by_tma(acc, up, bias_ptr, residual, y, m, n, N, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """The same by descriptors, of a tile whose first row and column are m and n."""
    out = _bias_act(acc, up, bias_ptr, n + tl.arange(0, acc.shape[1]), N, ACTIVATION, GATED)
    if residual is not None:
        out += residual.load([m, n]).to(tl.float32)
    y.store([m, n], out.to(y.dtype))


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns: each thread keeps what it holds."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS)), (0, 2, 1)))


@triton.jit
def _parts(tile, PARTS: tl.constexpr):
    """A tile's columns in equal parts, from left to right; a power of two.

    Whoever activates and stores one after the other puts each but the first behind a branch: else ptxas activates all
    of them before it stores the first, for which it has no registers.
    """
    parts = (tile,)
    for _ in tl.static_range(PARTS - 1):  # all are cut once before the first is cut again
        parts = parts[1:] + _halves(parts[0])
    return parts


@triton.jit
def _tile(ptr, start, SIZE, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first COLUMNS of ROWS rows from row `start`: a pointer, and offsets from it, for which 32 bits are enough.

    Rows past the end repeat the last one: what they yield is not stored.
    """
    rows = tl.minimum(tl.arange(0, ROWS), SIZE - 1 - start)
    return ptr + start.to(tl.int64) * stride, rows[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _start(ptr, start, SIZE, stride, k, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Lets the next kernel start, fetches the first columns of w, waits for the kernel before. See `target.has_pdl`."""
    LINE: tl.constexpr = 64  # elements of 16 bits in 128 bytes
    tl.extra.cuda.gdc_launch_dependents()
    rows = tl.minimum(start + tl.arange(0, ROWS), SIZE - 1).to(tl.int64) * stride
    prefetch_l2(ptr + rows[:, None] + tl.minimum(k + tl.arange(0, COLUMNS // LINE) * LINE, K - 1)[None, :])
    tl.extra.cuda.gdc_wait()


@triton.jit
def _decode_kernel(
    x_ptr, w_ptr, up_ptr, bias_ptr, residual_ptr, y_ptr, partials_ptr, arrived_ptr,
    M, N, K, stride_xm, stride_wn, stride_un, stride_rm, stride_ym,
    ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, PREFETCH_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = up_ptr is not None
    tile, split = tl.program_id(0), tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_K)
    begin, end = split * steps // SPLITS * BLOCK_K, (split + 1) * steps // SPLITS * BLOCK_K
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_offs = offs_m[:, None] * stride_xm + offs_k[None, :]
    w_tile, w_offs = _tile(w_ptr, tile * BLOCK_N, N, stride_wn, BLOCK_N, BLOCK_K)
    if GATED:
        up_tile, up_offs = _tile(up_ptr, tile * BLOCK_N, N, stride_un, BLOCK_N, BLOCK_K)
    if PDL:
        _start(w_ptr, tile * BLOCK_N, N, stride_wn, begin, K, BLOCK_N, PREFETCH_K)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    for k in range(begin, end, BLOCK_K):
        in_k = (offs_k < K - k)[None, :]
        x = tl.load(x_ptr + k + x_offs, mask=(offs_m < M)[:, None] & in_k, other=0.0)
        w = tl.load(w_tile + k + w_offs, mask=in_k, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(w, x.T, acc)
        if GATED:
            w = tl.load(up_tile + k + up_offs, mask=in_k, other=0.0, eviction_policy="evict_first")
            up = tl.dot(w, x.T, up)

    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        PARTS: tl.constexpr = 2 * SIZE if GATED else SIZE
        parts = partials_ptr + tile * SPLITS * PARTS + (tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + offs_m[None, :])
        tl.store(parts + split * PARTS, acc)
        if GATED:
            tl.store(parts + split * PARTS + SIZE, up)
        tl.debug_barrier()  # every thread has stored before one of them says so
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = acc
        for s in tl.static_range(SPLITS):
            acc += tl.load(parts + s * PARTS, cache_modifier=".cg")  # from L2, where the other programs' are
            if GATED:
                up += tl.load(parts + s * PARTS + SIZE, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)

    TOKENS: tl.constexpr = BLOCK_M if BLOCK_M < 64 else 64  # that are stored at a time
    accs, ups = _parts(acc, BLOCK_M // TOKENS), _parts(up, BLOCK_M // TOKENS)
    for i in tl.static_range(BLOCK_M // TOKENS):
        offs_m = i * TOKENS + tl.arange(0, TOKENS)
        if i == 0:
            _store_by_pointer(
                accs[i].T, ups[i].T, bias_ptr, residual_ptr, y_ptr, stride_rm, stride_ym, offs_m, offs_n, M, N,
                ACTIVATION, GATED,
            )  # fmt: skip
        elif i * TOKENS < M:
            _store_by_pointer(
                accs[i].T, ups[i].T, bias_ptr, residual_ptr, y_ptr, stride_rm, stride_ym, offs_m, offs_n, M, N,
                ACTIVATION, GATED,
            )  # fmt: skip


@triton.jit
def _vector_kernel(
    x_ptr, w_ptr, up_ptr, bias_ptr, residual_ptr, y_ptr, N, K, stride_wn, stride_un,
    ACTIVATION: tl.constexpr, PREFETCH_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = up_ptr is not None
    LANE: tl.constexpr = 8  # elements in the 16 bytes that a thread loads; it sums them by itself
    n = tl.program_id(0) * BLOCK_N
    offs_n, offs_k = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_tile, w_offs = _tile(w_ptr, n, N, stride_wn, BLOCK_N, BLOCK_K)
    if GATED:
        up_tile, up_offs = _tile(up_ptr, n, N, stride_un, BLOCK_N, BLOCK_K)
    if PDL:
        _start(w_ptr, n, N, stride_wn, 0, K, BLOCK_N, PREFETCH_K)

    acc = tl.zeros((BLOCK_N, BLOCK_K // LANE), tl.float32)
    up = acc
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = offs_k < K - k
        x = tl.load(x_ptr + k + offs_k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        w = tl.load(w_tile + k + w_offs, mask=in_k[None, :], other=0.0, eviction_policy="evict_first")
        acc += tl.sum(tl.reshape(w.to(tl.float32) * x, (BLOCK_N, BLOCK_K // LANE, LANE)), 2)
        if GATED:
            w = tl.load(up_tile + k + up_offs, mask=in_k[None, :], other=0.0, eviction_policy="evict_first")
            up += tl.sum(tl.reshape(w.to(tl.float32) * x, (BLOCK_N, BLOCK_K // LANE, LANE)), 2)

    M: tl.constexpr = 1
    offs_m = tl.arange(0, M)
    acc, up = tl.sum(acc, 1)[None], tl.sum(up, 1)[None]
    _store_by_pointer(acc, up, bias_ptr, residual_ptr, y_ptr, N, N, offs_m, offs_n, M, N, ACTIVATION, GATED)


@triton.jit
def _prefill_kernel(
    x, w, w_up, residual, y, bias_ptr, M, N, K, stride_xm, stride_wn, stride_un, stride_rm, stride_ym,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STORE_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x, w, w_up, residual and y are descriptors made by the host; pointers if warps are specialised."""
    GATED: tl.constexpr = w_up is not None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if SPECIALIZE:  # the compiler shares a tile's rows out to groups of warps, and cuts descriptors that it sees made
        x = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        w = tl.make_tensor_descriptor(w, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        if GATED:
            w_up = tl.make_tensor_descriptor(w_up, [N, K], [stride_un, 1], [BLOCK_N, BLOCK_K])
        if residual is not None:
            residual = tl.make_tensor_descriptor(residual, [M, N], [stride_rm, 1], [BLOCK_M, STORE_N])
        y = tl.make_tensor_descriptor(y, [M, N], [stride_ym, 1], [BLOCK_M, STORE_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        # Tiles that run at the same time form blocks of GROUP_M rows of tiles: L2 serves each x and w to many of them.
        group = tile // (GROUP_M * tiles_n)
        rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + tile % (GROUP_M * tiles_n) % rows) * BLOCK_M
        n = tile % (GROUP_M * tiles_n) // rows * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = acc
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([m, k])
            acc = tl.dot(x_tile, w.load([n, k]).T, acc)
            if GATED:
                up = tl.dot(x_tile, w_up.load([n, k]).T, up)
        PARTS: tl.constexpr = BLOCK_N // STORE_N
        accs, ups = _parts(acc, PARTS), _parts(up, PARTS)
        for i in tl.static_range(PARTS):
            start = n + i * STORE_N
            if i == 0 or FLATTEN:  # a flattened loop does not compile with a branch
                _store_by_tma(accs[i], ups[i], bias_ptr, residual, y, m, start, N, ACTIVATION, GATED)
            elif start < N:
                _store_by_tma(accs[i], ups[i], bias_ptr, residual, y, m, start, N, ACTIVATION, GATED)
