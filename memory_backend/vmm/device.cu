/* Stamps on the device: the same words at the same offsets as in stamps.py.
 *
 * device.ptx, which the package ships, is made from this file by
 *     python -m hbmgym.memory_backend.vmm.build_device
 * that is, by nvcc -ptx -arch=compute_75: any driver of CUDA 13 compiles it for its own GPU, Turing or later.
 *
 * Plain C as far as that goes, so that a host compiler can build it too: whoever does that says what __global__,
 * __device__, blockIdx, blockDim, threadIdx and clock_ns are.
 */

#ifdef __cplusplus
#define ENTRY extern "C" __global__
#else
#define ENTRY __global__
#endif

#define WORD_BYTES 8

/* A STAMP or CHECK; STAMP_ENTRY in device_blocks.py has the same fields. */
struct StampEntry {
    unsigned long long address; /* of the block */
    long long bytes;            /* of the block */
    long long tag;
    long long is_check;
    long long wrong_word;     /* out: index of the first word that does not read back; left alone if all do */
    unsigned long long found; /* out: what lies there */
};

#ifdef __CUDACC__
__device__ static unsigned long long clock_ns(void)
{
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
#endif

/* The finaliser of splitmix64 (Steele et al. 2014). */
__device__ static unsigned long long salt(unsigned long long offset)
{
    unsigned long long x = (offset + 1) * 0x9E3779B97F4A7C15ULL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

/* Words of the chunk grid inside a block, and one at its end. */
__device__ static long long word_count(long long bytes, long long chunk_bytes)
{
    return (bytes - 2 * WORD_BYTES) / chunk_bytes + 2;
}

__device__ static long long word_offset(long long word, long long words, long long bytes, long long chunk_bytes)
{
    return word == words - 1 ? bytes - WORD_BYTES : word * chunk_bytes;
}

/* Blocks may start at odd addresses, so words are moved byte by byte. */
__device__ static void store_word(unsigned char *at, unsigned long long word)
{
    for (int i = 0; i < WORD_BYTES; i++)
        at[i] = (unsigned char)(word >> (8 * i));
}

__device__ static unsigned long long load_word(const unsigned char *at)
{
    unsigned long long word = 0;
    for (int i = 0; i < WORD_BYTES; i++)
        word |= (unsigned long long)at[i] << (8 * i);
    return word;
}

/* Executes entries[0..count-1], which do not conflict, one thread each. */
ENTRY void run_stamps(struct StampEntry *entries, int count, long long chunk_bytes)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count)
        return;
    struct StampEntry *entry = entries + i;
    unsigned char *block = (unsigned char *)entry->address;
    long long words = word_count(entry->bytes, chunk_bytes);
    for (long long word = 0; word < words; word++) {
        long long offset = word_offset(word, words, entry->bytes, chunk_bytes);
        unsigned long long expected = (unsigned long long)entry->tag ^ salt((unsigned long long)offset);
        if (!entry->is_check) {
            store_word(block + offset, expected);
        } else if (load_word(block + offset) != expected) {
            entry->wrong_word = word;
            entry->found = load_word(block + offset);
            return;
        }
    }
}

/* Keeps one thread busy for a time: a kernel in flight, for tests and measurements. */
ENTRY void spin(unsigned long long nanoseconds)
{
    unsigned long long start = clock_ns();
    while (clock_ns() - start < nanoseconds) {
    }
}
