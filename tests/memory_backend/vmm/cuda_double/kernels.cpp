// The device's source compiled for the CPU: every thread of a launch runs, one after the other.
#include "abi.h"

#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <time.h>

struct uint3 {
    unsigned x, y, z;
};

static uint3 gridDim, blockDim, blockIdx, threadIdx;

#define __global__
#define __device__

static unsigned long long clock_ns()
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1000000000ull * now.tv_sec + now.tv_nsec;
}

#include DEVICE_SOURCE

// ---- a kernel as a table row: its name, its parameters' sizes, and a call that takes them from an array ----

template <unsigned... I> struct Numbers {
};

template <unsigned N, unsigned... I> struct Count : Count<N - 1, N - 1, I...> {
};

template <unsigned... I> struct Count<0, I...> {
    typedef Numbers<I...> type;
};

template <class F, F function> struct Row;

template <class... P, void (*function)(P...)> struct Row<void (*)(P...), function> {
    static const size_t sizes[sizeof...(P)];

    template <unsigned... I> static void call(void **parameters, Numbers<I...>)
    {
        function(*(P *)parameters[I]...);
    }

    static void run(void **parameters)
    {
        call(parameters, typename Count<sizeof...(P)>::type());
    }

    static Kernel row(const char *name)
    {
        static_assert(sizeof...(P) <= MAX_PARAMETERS, "a kernel has too many parameters");
        Kernel kernel = {name, (int)sizeof...(P), sizes, run};
        return kernel;
    }
};

template <class... P, void (*function)(P...)>
const size_t Row<void (*)(P...), function>::sizes[sizeof...(P)] = {sizeof(P)...};

#define KERNEL(name) Row<decltype(&name), &name>::row(#name),

static const Kernel kernels[] = {KERNELS{0, 0, 0, 0}};

extern "C" const Kernel *find_kernel(const char *name)
{
    for (const Kernel *kernel = kernels; kernel->name; kernel++)
        if (!strcmp(kernel->name, name))
            return kernel;
    return 0;
}

// ---- running one ----

static sigjmp_buf before_fault;

static void on_fault(int)
{
    siglongjmp(before_fault, 1);
}

static void run_threads(const Kernel *kernel, void **parameters, bool backwards)
{
    unsigned long long per_block = 1ull * blockDim.x * blockDim.y * blockDim.z;
    unsigned long long threads = per_block * gridDim.x * gridDim.y * gridDim.z;
    for (unsigned long long i = 0; i < threads; i++) {
        unsigned long long number = backwards ? threads - 1 - i : i;
        unsigned thread = (unsigned)(number % per_block);
        unsigned long long block = number / per_block;
        threadIdx.x = thread % blockDim.x;
        threadIdx.y = thread / blockDim.x % blockDim.y;
        threadIdx.z = thread / blockDim.x / blockDim.y;
        blockIdx.x = (unsigned)(block % gridDim.x);
        blockIdx.y = (unsigned)(block / gridDim.x % gridDim.y);
        blockIdx.z = (unsigned)(block / gridDim.x / gridDim.y);
        kernel->run(parameters);
    }
}

extern "C" bool run_kernel(const Kernel *kernel, Extent grid, Extent block, void **parameters, bool backwards)
{
    struct sigaction guard, segv, bus;
    memset(&guard, 0, sizeof guard);
    guard.sa_handler = on_fault;
    guard.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &guard, &segv);
    sigaction(SIGBUS, &guard, &bus);
    volatile bool whole = false;
    if (!sigsetjmp(before_fault, 1)) {
        gridDim = {grid.x, grid.y, grid.z};
        blockDim = {block.x, block.y, block.z};
        run_threads(kernel, parameters, backwards);
        whole = true;
    }
    sigaction(SIGSEGV, &segv, 0);
    sigaction(SIGBUS, &bus, 0);
    return whole;
}
