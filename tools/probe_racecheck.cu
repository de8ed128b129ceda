// What compute-sanitizer's racecheck makes of words handed over by mbarriers in shared memory.
//
//   nvcc -arch=sm_90 -o probe_racecheck tools/probe_racecheck.cu
//   for mode in each one none; do compute-sanitizer --tool racecheck ./probe_racecheck $mode; done
//
// 64 threads write a word each, 64 others read them, four times over one buffer. Modes:
//   each  every thread arrives at the barrier itself
//   one   the 64 threads of a side meet at a named barrier, then one of them arrives: so does the
//         code that Triton makes of handover.py
//   none  the readers do not wait: a race, which racecheck must report
// In the modes "each" and "one" every read is ordered after its write, and every later write after
// the read. The program prints "right" if each word that was read was the one that was due.

#include <cstdint>
#include <cstdio>
#include <cstring>

enum Mode { EACH, ONE, NONE };

__device__ unsigned address(const uint64_t *barrier) {
    return static_cast<unsigned>(__cvta_generic_to_shared(barrier));
}

__device__ void arrive(uint64_t *barrier) {
    asm volatile("{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(address(barrier))
                 : "memory");
}

__device__ void wait(uint64_t *barrier, unsigned parity) {
    unsigned done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address(barrier)), "r"(parity)
                     : "memory");
}

__device__ void signal(uint64_t *barrier, int side, int lane, Mode mode) {
    if (mode == ONE) {
        asm volatile("bar.sync %0, 64;" ::"r"(side + 1) : "memory");
        if (lane == 0) arrive(barrier);
    } else {
        arrive(barrier);
    }
}

__global__ void hand_over(int *wrong, Mode mode) {
    __shared__ int words[64];
    __shared__ uint64_t full, empty;
    int side = threadIdx.x / 64, lane = threadIdx.x % 64;
    if (threadIdx.x == 0) {
        unsigned count = mode == ONE ? 1 : 64;
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&full)), "r"(count));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&empty)), "r"(count));
    }
    __syncthreads();
    for (int round = 0; round < 4; ++round) {
        if (side == 0) {
            if (mode != NONE) wait(&empty, (round & 1) ^ 1);
            words[lane] = round * 64 + lane;
            signal(&full, side, lane, mode);
        } else {
            if (mode != NONE) wait(&full, round & 1);
            if (words[63 - lane] != round * 64 + 63 - lane) atomicAdd(wrong, 1);
            signal(&empty, side, lane, mode);
        }
    }
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "each";
    Mode mode = !strcmp(name, "one") ? ONE : !strcmp(name, "none") ? NONE : EACH;
    int *wrong, result = 0;
    if (cudaMalloc(&wrong, sizeof(int)) || cudaMemset(wrong, 0, sizeof(int))) return 2;
    hand_over<<<1, 128>>>(wrong, mode);
    if (cudaMemcpy(&result, wrong, sizeof(int), cudaMemcpyDeviceToHost)) return 2;
    printf("%s: %s\n", name, result ? "wrong" : "right");
    return 0;
}
