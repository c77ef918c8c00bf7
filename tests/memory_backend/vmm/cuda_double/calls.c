/* Who may call what: one lock, a log of calls, faults on demand, and the primary context. */
#include "abi.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_FUNCTIONS 128
#define MAX_FAULTS 64
#define MAX_LOG 65536
#define MAX_DEPTH 16
#define DEFAULT_MEMORY ((size_t)4 << 30)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pid_t owner; /* the process that called cuInit */

/* ---- the lock ---- */

void lock_double(void)
{
    pthread_mutex_lock(&lock);
}

void unlock_double(void)
{
    pthread_mutex_unlock(&lock);
}

bool wait_for_change(double seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)seconds;
    return pthread_cond_timedwait(&changed, &lock, &until) != ETIMEDOUT;
}

void announce_change(void)
{
    pthread_cond_broadcast(&changed);
}

double now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- the log of calls, and calls that fail on demand ---- */

typedef struct {
    char function[64];
    long after; /* calls that go through before */
    long times;
    CUresult result;
} Fault;

static struct {
    const char *name;
    long count;
} functions[MAX_FUNCTIONS];
static const char *calls[MAX_LOG];
static long call_count;
static Fault faults[MAX_FAULTS];
static int fault_count;

static void count_call(const char *function)
{
    int i = 0;
    while (functions[i].name && strcmp(functions[i].name, function))
        i++;
    functions[i].name = function;
    functions[i].count++;
    calls[call_count++ % MAX_LOG] = function;
}

static CUresult planned_fault(const char *function)
{
    CUresult result = SUCCESS;
    for (int i = 0; i < fault_count; i++) {
        Fault *fault = &faults[i];
        if (strcmp(fault->function, function) || fault->times == 0)
            continue;
        if (fault->after > 0)
            fault->after--;
        else if (result == SUCCESS) {
            fault->times--;
            result = fault->result;
        }
    }
    return result;
}

/* ---- the primary context ---- */

static int context_references;
static int context_life = 1; /* counts the lives of the primary context: a handle names one of them */
static CUresult poisoned;
static _Thread_local intptr_t stack[MAX_DEPTH]; /* the lives this thread made current; the last one counts */
static _Thread_local int depth;

void poison(CUresult error)
{
    if (!poisoned)
        poisoned = error;
}

bool is_poisoned(void)
{
    return poisoned != SUCCESS;
}

static intptr_t current(void)
{
    return depth ? stack[depth - 1] : 0;
}

static bool is_alive(intptr_t life)
{
    return life == context_life && context_references > 0;
}

/* The double asks for a context in every call on memory; a GPU may map without one. */
static CUresult context_problem(void)
{
    if (!current())
        return INVALID_CONTEXT;
    return is_alive(current()) ? poisoned : CONTEXT_IS_DESTROYED;
}

bool in_forked_child(void)
{
    return owner && owner != getpid();
}

CUresult enter(const char *function, Needs needs)
{
    lock_double();
    count_call(function);
    CUresult fault = planned_fault(function);
    if (fault)
        return fault;
    if (needs >= INITIALISED && !owner)
        return NOT_INITIALIZED;
    return needs == CURRENT_CONTEXT ? context_problem() : SUCCESS;
}

CUresult leave(CUresult result)
{
    unlock_double();
    return result;
}

static CUresult initialise(unsigned flags)
{
    if (flags)
        return INVALID_VALUE;
    if (!owner)
        reset_memory(DEFAULT_MEMORY);
    owner = getpid();
    return SUCCESS;
}

static CUresult retain_context(void **context, int device)
{
    if (device != 0)
        return INVALID_DEVICE;
    context_references++;
    *context = (void *)(intptr_t)context_life;
    return SUCCESS;
}

static CUresult release_context(int device)
{
    if (device != 0)
        return INVALID_DEVICE;
    if (context_references == 0)
        return INVALID_CONTEXT;
    if (--context_references == 0) {
        finish_all();
        context_life++;
        poisoned = SUCCESS;
    }
    return SUCCESS;
}

static CUresult push_context(void *context)
{
    if (!is_alive((intptr_t)context))
        return INVALID_CONTEXT;
    if (depth == MAX_DEPTH)
        return UNKNOWN;
    stack[depth++] = (intptr_t)context;
    return SUCCESS;
}

static CUresult pop_context(void **context)
{
    if (!depth)
        return INVALID_CONTEXT;
    *context = (void *)stack[--depth];
    return SUCCESS;
}

/* Replaces the last context of the thread's stack; NULL only takes it away. */
static CUresult set_current(void *context)
{
    if (context && !is_alive((intptr_t)context))
        return INVALID_CONTEXT;
    depth -= depth > 0;
    return context ? push_context(context) : SUCCESS;
}

static CUresult get_current(void **context)
{
    *context = (void *)current();
    return SUCCESS;
}

API CUresult cuInit(unsigned flags)
{
    CALL(ANYTIME, initialise(flags));
}

API CUresult cuDevicePrimaryCtxRetain(void **context, int device)
{
    CALL(INITIALISED, retain_context(context, device));
}

API CUresult cuDevicePrimaryCtxRelease_v2(int device)
{
    CALL(INITIALISED, release_context(device));
}

API CUresult cuCtxSetCurrent(void *context)
{
    CALL(INITIALISED, set_current(context));
}

API CUresult cuCtxPushCurrent_v2(void *context)
{
    CALL(INITIALISED, push_context(context));
}

API CUresult cuCtxPopCurrent_v2(void **context)
{
    CALL(INITIALISED, pop_context(context));
}

API CUresult cuCtxGetCurrent(void **context)
{
    CALL(INITIALISED, get_current(context));
}

/* ---- controls for tests ---- */

/* Everything as in a process that has just called cuInit, with a device of `bytes`. */
API void double_reset(size_t bytes)
{
    lock_double();
    reset_work();
    for (Kind kind = STREAM; kind <= MODULE; kind++)
        while (first_object(kind))
            delete_object(first_object(kind));
    reset_memory(bytes);
    memset(functions, 0, sizeof functions);
    call_count = 0;
    fault_count = 0;
    context_references = 0;
    context_life++;
    poisoned = SUCCESS;
    unlock_double();
}

/* `after` calls of `function` go through, the next `times` return `result` and do nothing. */
API void double_fail(const char *function, long after, long times, CUresult result)
{
    lock_double();
    if (fault_count == MAX_FAULTS)
        abort();
    Fault *fault = &faults[fault_count++];
    snprintf(fault->function, sizeof fault->function, "%s", function);
    fault->after = after;
    fault->times = times;
    fault->result = result;
    unlock_double();
}

API void double_heal(void)
{
    lock_double();
    fault_count = 0;
    unlock_double();
}

API long double_calls(const char *function)
{
    lock_double();
    long count = 0;
    for (int i = 0; functions[i].name; i++)
        count += strcmp(functions[i].name, function) ? 0 : functions[i].count;
    unlock_double();
    return count;
}

API long double_call_count(void)
{
    lock_double();
    long count = call_count;
    unlock_double();
    return count;
}

/* Name of the call with that number, counted from 0; NULL when it was not made or is too long ago. */
API const char *double_call_at(long number)
{
    lock_double();
    bool kept = number >= 0 && number < call_count && number >= call_count - MAX_LOG;
    const char *name = kept ? calls[number % MAX_LOG] : NULL;
    unlock_double();
    return name;
}

API long double_context_references(void)
{
    lock_double();
    long references = context_references;
    unlock_double();
    return references;
}

API int double_is_poisoned(void)
{
    lock_double();
    int yes = is_poisoned();
    unlock_double();
    return yes;
}

API long double_early_releases(void)
{
    lock_double();
    long count = early_releases();
    unlock_double();
    return count;
}
