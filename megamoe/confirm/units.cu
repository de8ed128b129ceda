// What a chip computes, asked of the chip: silu of every bfloat16 gate, and words of one
// instruction. Built by megamoe/confirm/gpu.py with nvcc, called by ctypes with host pointers.
// Every function returns 0, or a cudaError, or -1 where the chip has no such instruction.
#include <cstdint>
#include <cuda_runtime.h>

namespace {

__global__ void silu_kernel(const float* gate, float* fast, float* precise, float* reciprocal) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float g = gate[i];
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(__fadd_rn(1.0f, __expf(-g))));
    fast[i] = __fmul_rn(g, r);
    const float d = __fadd_rn(1.0f, expf(-g));
    precise[i] = __fdiv_rn(g, d);
    reciprocal[i] = __fmul_rn(g, __fdiv_rn(1.0f, d));
}

// One warpgroup a tile: D (64, 8) = C + A (64, K) * B (8, K)^T, 32 bytes of K a step, in order.
// A's rows and B's rows are `bytes` long. KIND 0 is e4m3, KIND 1 bfloat16.
template <int KIND>
__global__ void wgmma_kernel(const uint8_t* a, const uint8_t* b, const float* c, float* d,
                             int bytes) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __shared__ alignas(128) uint8_t tile[256];
    const int lane = threadIdx.x & 31;
    const int row = (threadIdx.x >> 5) * 16 + (lane >> 2);
    const int column = (lane & 3) * 2;
    const size_t at = size_t(blockIdx.x);
    const uint8_t* low = a + (at * 64 + row) * bytes + (lane & 3) * 4;
    const uint8_t* high = low + size_t(8) * bytes;
    const size_t out = (at * 64 + row) * 8 + column;
    float s0 = c[out], s1 = c[out + 1], s2 = c[out + 64], s3 = c[out + 65];
    // Without swizzling: 8 rows of 16 bytes are together, the next 16 bytes of K 128 behind them.
    const uint64_t start = uint64_t(__cvta_generic_to_shared(tile)) >> 4 & 0x3FFF;
    const uint64_t descriptor = start | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
    for (int k = 0; k < bytes; k += 32) {
        for (int i = threadIdx.x; i < 256; i += 128) {
            const int half = i >> 7, n = i >> 4 & 7, byte = i & 15;
            tile[i] = b[(at * 8 + n) * bytes + k + half * 16 + byte];
        }
        const uint32_t a0 = *reinterpret_cast<const uint32_t*>(low + k);
        const uint32_t a1 = *reinterpret_cast<const uint32_t*>(high + k);
        const uint32_t a2 = *reinterpret_cast<const uint32_t*>(low + k + 16);
        const uint32_t a3 = *reinterpret_cast<const uint32_t*>(high + k + 16);
        asm volatile("fence.proxy.async;" ::: "memory");
        __syncthreads();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        if (KIND == 0) {
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1;"
                : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor)
                : "memory");
        } else {
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
                : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor)
                : "memory");
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        __syncthreads();
    }
    d[out] = s0, d[out + 1] = s1, d[out + 64] = s2, d[out + 65] = s3;
#endif
}

struct Buffers {
    void* held[4] = {};
    ~Buffers() {
        for (void* each : held) cudaFree(each);
    }
};

}  // namespace

#define TRY(call)                                   \
    do {                                            \
        const cudaError_t error = (call);           \
        if (error != cudaSuccess) return int(error); \
    } while (0)

extern "C" int silu(const float* gate, float* fast, float* precise, float* reciprocal) {
    constexpr int count = 1 << 16;
    constexpr size_t size = count * sizeof(float);
    Buffers memory;
    for (void*& each : memory.held) TRY(cudaMalloc(&each, size));
    float* at[4];
    for (int i = 0; i < 4; ++i) at[i] = static_cast<float*>(memory.held[i]);
    TRY(cudaMemcpy(at[0], gate, size, cudaMemcpyHostToDevice));
    silu_kernel<<<count / 256, 256>>>(at[0], at[1], at[2], at[3]);
    TRY(cudaGetLastError());
    float* to[3] = {fast, precise, reciprocal};
    for (int i = 0; i < 3; ++i) TRY(cudaMemcpy(to[i], at[i + 1], size, cudaMemcpyDeviceToHost));
    return 0;
}

extern "C" int wgmma(int kind, const uint8_t* a, const uint8_t* b, const float* c, float* d,
                     int tiles, int bytes) {
    int device = 0, major = 0;
    TRY(cudaGetDevice(&device));
    TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major != 9) return -1;
    const size_t sums = size_t(tiles) * 64 * 8 * sizeof(float);
    const size_t sizes[4] = {size_t(tiles) * 64 * bytes, size_t(tiles) * 8 * bytes, sums, sums};
    Buffers memory;
    for (int i = 0; i < 4; ++i) TRY(cudaMalloc(&memory.held[i], sizes[i]));
    const void* from[3] = {a, b, c};
    for (int i = 0; i < 3; ++i)
        TRY(cudaMemcpy(memory.held[i], from[i], sizes[i], cudaMemcpyHostToDevice));
    auto* left = static_cast<const uint8_t*>(memory.held[0]);
    auto* right = static_cast<const uint8_t*>(memory.held[1]);
    auto* start = static_cast<const float*>(memory.held[2]);
    auto* end = static_cast<float*>(memory.held[3]);
    if (kind == 0)
        wgmma_kernel<0><<<tiles, 128>>>(left, right, start, end, bytes);
    else
        wgmma_kernel<1><<<tiles, 128>>>(left, right, start, end, bytes);
    TRY(cudaGetLastError());
    TRY(cudaMemcpy(d, end, sums, cudaMemcpyDeviceToHost));
    return 0;
}
