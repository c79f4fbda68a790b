"""Small tiles for the interpreter: every kernel of gemm and gated_gemm, in each way that it can be made to run."""

from interpreted import interpreted

_configs = interpreted("gemm_configs")
Vector, Decode, Prefill = _configs.Vector, _configs.Decode, _configs.Prefill

# Name -> (kernel, configuration, M, N, K). Sizes lie off the grid; those of prefill at multiples of 16 bytes. At least
# 4000 results each: the largest error of 70 is luck, in float32 more than twice torch's for 4 to 12 seeds of 100; of
# 4500 for one of 200, with an RMS error of at most 1.2 times torch's.
TILES = {
    "vector": ("vector", Vector(block_n=2048, block_k=32, num_warps=4, num_stages=2), 1, 4500, 45),
    "decode": ("decode", Decode(block_n=512, block_k=16, programs_per_sm=0, num_warps=4, num_stages=2), 5, 1300, 45),
    "decode, 1 token": ("decode", Decode(2048, 16, 0, 4, 2), 1, 4500, 45),
    "decode, 33 tokens": ("decode", Decode(64, 32, 0, 4, 2), 33, 140, 45),
    "decode, 70 tokens in parts of 64": ("decode", Decode(64, 32, 0, 4, 2), 70, 140, 45),
    "decode, K in 2 and 1 steps": ("decode", Decode(512, 16, 2, 4, 2), 5, 1300, 45),
    "decode, one step a program": ("decode", Decode(32, 16, 16, 4, 2), 33, 140, 45),
    "prefill": ("prefill", Prefill(32, 64, 16, group_m=2, num_warps=4, num_stages=2), 33, 136, 48),
    "prefill, in parts, two past N": ("prefill", Prefill(32, 256, 16, 2, 4, 2), 33, 328, 48),
    "prefill, ragged groups": ("prefill", Prefill(16, 16, 32, group_m=4, num_warps=4, num_stages=2), 90, 72, 40),
    "prefill, flat": ("prefill", Prefill(32, 64, 16, 2, 4, 2, flatten=True), 33, 136, 48),
    "prefill, specialised": ("prefill", Prefill(32, 128, 16, 2, 4, 2, specialize=True), 33, 136, 48),
}
