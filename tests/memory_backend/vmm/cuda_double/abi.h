/* The part of the CUDA driver's ABI that the double serves, and what its files share. Numbers are those of cuda.h.

   Whatever the double refuses, a test in test_cuda_rules.py expects of libcuda itself; where the double is stricter
   than a GPU, or a GPU's answer is not defined, a comment says so.
*/
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

typedef int CUresult;
typedef uint64_t Address; /* CUdeviceptr */

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_TIMEOUT = 702,
    CONTEXT_IS_DESTROYED = 709,
    UNKNOWN = 999,
};

enum { ACCESS_NONE = 0, ACCESS_READ = 1, ACCESS_READ_WRITE = 3 };

#define GRANULE ((size_t)2 << 20)

/* ---- objects: everything that a caller can leak ---- */

typedef enum { RESERVATION, HANDLE, MAPPING, ALLOCATION, PINNED, STREAM, EVENT, MODULE, KINDS } Kind;

typedef struct Object {
    Kind kind;
    struct Object *next;
    Address at; /* first byte; of a HANDLE: offset in the device's memory */
    size_t size;
    struct Object *handle; /* MAPPING: the memory it shows */
    int access;            /* MAPPING */
    int references;        /* HANDLE: creations and retentions not yet released */
    int mappings;          /* HANDLE */
    unsigned flags;        /* STREAM, EVENT */
    uint64_t serial;       /* STREAM: its number; EVENT: the work that records it, 0 before */
    double seconds;        /* EVENT: when it was reached */
    char *text;            /* MODULE: its PTX */
} Object;

Object *new_object(Kind kind, Address at, size_t size);
void delete_object(Object *object);
Object *first_object(Kind kind);
/* The live object of that kind at that pointer, or NULL: callers may hand in anything. */
Object *find_object(Kind kind, const void *pointer);
/* The live object of that kind whose range holds `at`, or NULL. */
Object *object_over(Kind kind, Address at);

/* ---- calls: one lock, a log, faults on demand, and who may call what ---- */

typedef enum { ANYTIME, INITIALISED, CURRENT_CONTEXT } Needs;

/* Takes the lock and says whether the call may go on; `leave` gives the lock back in any case. */
CUresult enter(const char *function, Needs needs);
CUresult leave(CUresult result);
bool in_forked_child(void);
void lock_double(void);
void unlock_double(void);
/* Waits without the lock until something changed; false after `seconds`. */
bool wait_for_change(double seconds);
void announce_change(void);
/* From now on every call that needs a context fails with `error`, as after a fault on a GPU. */
void poison(CUresult error);
bool is_poisoned(void);
double now_seconds(void);

#define CALL(needs, work)                         \
    do {                                          \
        if (in_forked_child())                    \
            return NOT_INITIALIZED;               \
        CUresult result = enter(__func__, needs); \
        return leave(result ? result : (work));   \
    } while (0)

/* ---- memory ---- */

/* Can every byte of [at, at + size) be reached with `access`? */
bool is_accessible(Address at, size_t size, int access);
bool is_pinned(const void *at, size_t size);
size_t total_bytes(void);
int early_releases(void);
void reset_memory(size_t bytes);

/* ---- work in flight ---- */

/* Does work in flight name a byte of [at, at + size)? */
bool in_flight(Address at, size_t size);
void finish_all(void);
void reset_work(void);

/* ---- kernels ---- */

typedef struct Kernel {
    const char *name;
    int parameters;
    const size_t *sizes;
    void (*run)(void **parameters);
} Kernel;

typedef struct {
    unsigned x, y, z;
} Extent;

#define MAX_PARAMETERS 32

#ifdef __cplusplus
extern "C" {
#endif
/* The kernel of that name in the device's source, or NULL. */
const Kernel *find_kernel(const char *name);
/* Runs every thread, last one first if `backwards`; false when one reached memory it may not. */
bool run_kernel(const Kernel *kernel, Extent grid, Extent block, void **parameters, bool backwards);
#ifdef __cplusplus
}
#endif
