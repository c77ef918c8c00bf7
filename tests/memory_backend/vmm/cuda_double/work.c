/* Work in flight: a launch only notes what is to be done; it is done when somebody waits for it.

   Order is kept where CUDA keeps it (one stream; the default stream against blocking ones; a wait for an event) and
   nowhere else. So a forgotten wait shows: what was not waited for has not happened. A query says NOT_READY as often
   as `double_hold` asks for, or until `double_finish`.
*/
#include "work.h"

#include <stdlib.h>
#include <string.h>

#define FOREVER (-1L)
#define DEFAULT_QUERIES 2L
#define WATCHDOG_SECONDS 20.0

static Work *oldest;
static Work **end = &oldest; /* where the next work joins the list */
static uint64_t serials;
static long hold = DEFAULT_QUERIES;
static bool backwards = true;

/* ---- order ---- */

static bool must_precede(const Work *early, const Work *late)
{
    if (early->stream == late->stream || (late->kind == WAIT && early->serial == late->awaited))
        return true;
    return (early->stream == 0 && late->blocking) || (late->stream == 0 && early->blocking);
}

static void remove_work(Work *work)
{
    Work **link = &oldest;
    while (*link != work)
        link = &(*link)->next;
    *link = work->next;
    if (!work->next)
        end = link;
    for (int i = 0; i < MAX_PARAMETERS; i++)
        free(work->parameters[i]);
    free(work->staged);
    free(work);
}

/* ---- doing it ---- */

static bool do_copy(const Work *work)
{
    bool from_device = !work->staged;
    if (!is_pinned((void *)(uintptr_t)work->target, work->size) &&
        !is_accessible(work->target, work->size, ACCESS_READ_WRITE))
        return false;
    if (from_device && !is_accessible(work->source, work->size, ACCESS_READ))
        return false;
    const void *source = from_device ? (void *)(uintptr_t)work->source : work->staged;
    memmove((void *)(uintptr_t)work->target, source, work->size);
    return true;
}

static bool do_fill(const Work *work)
{
    if (!is_accessible(work->target, work->size, ACCESS_READ_WRITE))
        return false;
    memset((void *)(uintptr_t)work->target, work->byte, work->size);
    return true;
}

static bool do_record(const Work *work)
{
    for (Object *event = first_object(EVENT); event; event = event->next)
        if (event->serial == work->serial)
            event->seconds = now_seconds();
    return true;
}

static bool do_work(Work *work)
{
    switch (work->kind) {
    case COPY:
        return do_copy(work);
    case FILL:
        return do_fill(work);
    case LAUNCH:
        return run_kernel(work->kernel, work->grid, work->block, work->parameters, backwards);
    case RECORD:
        return do_record(work);
    default:
        return true;
    }
}

/* Does the work and, before, all that must precede it. After a fault a GPU does nothing more. */
static void finish(Work *work)
{
    for (Work *early = oldest; early != work;) {
        bool first = must_precede(early, work);
        if (first)
            finish(early);
        early = first ? oldest : early->next;
    }
    if (!is_poisoned() && !do_work(work))
        poison(ILLEGAL_ADDRESS);
    remove_work(work);
}

void finish_all(void)
{
    while (oldest)
        finish(oldest);
}

/* ---- waiting ---- */

Work *find_work(uint64_t serial)
{
    Work *work = oldest;
    while (work && work->serial != serial)
        work = work->next;
    return work;
}

Work *last_on_stream(uint64_t stream)
{
    Work *last = NULL;
    for (Work *work = oldest; work; work = work->next)
        last = work->stream == stream ? work : last;
    return last;
}

static bool has_still_predecessor(const Work *work)
{
    const Work *early = oldest;
    while (early != work && !(early->still && must_precede(early, work)))
        early = early->next;
    return early != work;
}

/* Does the work, or work that must precede it, stay in flight until double_finish? */
static bool stands_still(const Work *work)
{
    bool found = false;
    for (Work *each = oldest; each; each = each->next) {
        each->still = each->queries == FOREVER || (found && has_still_predecessor(each));
        found = found || each->still;
    }
    return work->still;
}

CUresult query(Work *work)
{
    if (!work)
        return SUCCESS;
    if (work->queries > 0 || stands_still(work)) {
        work->queries -= work->queries > 0;
        return NOT_READY;
    }
    finish(work);
    return is_poisoned() ? ILLEGAL_ADDRESS : SUCCESS;
}

CUresult synchronise(Work *work)
{
    uint64_t serial = work ? work->serial : 0;
    double deadline = now_seconds() + WATCHDOG_SECONDS;
    while ((work = find_work(serial)) && stands_still(work))
        if (now_seconds() > deadline || !wait_for_change(1.0 + deadline - now_seconds()))
            return LAUNCH_TIMEOUT;
    if (work)
        finish(work);
    return is_poisoned() ? ILLEGAL_ADDRESS : SUCCESS;
}

CUresult synchronise_all(void)
{
    CUresult result = SUCCESS;
    while (oldest && !result)
        result = synchronise(oldest);
    return result;
}

/* ---- launching ---- */

bool is_stream(const void *stream)
{
    return (uintptr_t)stream <= 1 || find_object(STREAM, stream);
}

uint64_t stream_number(const Object *stream)
{
    return (uintptr_t)stream <= 1 ? 0 : stream->serial;
}

Work *new_work(WorkKind kind, const Object *stream)
{
    Work *work = calloc(1, sizeof *work);
    if (!work)
        abort();
    work->kind = kind;
    work->serial = ++serials;
    work->stream = stream_number(stream);
    work->blocking = work->stream && !(stream->flags & NON_BLOCKING);
    work->queries = hold;
    return work;
}

CUresult launch(Work *work)
{
    *end = work;
    end = &work->next;
    if (hold == 0)
        finish(work);
    return SUCCESS;
}

/* Unmapping what this names costs the context; on a GPU it does so if the work comes to the bytes later. */
bool in_flight(Address at, size_t size)
{
    for (Work *work = oldest; work; work = work->next) {
        bool writes = work->target < at + size && at < work->target + work->size;
        bool reads = !work->staged && work->source < at + size && at < work->source + work->size;
        /* What a kernel reaches its parameters do not tell: it may be any mapped byte. */
        if (work->kind == LAUNCH || ((work->kind == COPY || work->kind == FILL) && (writes || reads)))
            return true;
    }
    return false;
}

void reset_work(void)
{
    while (oldest)
        remove_work(oldest);
    hold = DEFAULT_QUERIES;
    backwards = true;
}

/* ---- controls for tests ---- */

/* Work launched from now on answers NOT_READY to this many queries; 0: it is done at once; -1: until double_finish. */
API void double_hold(long queries)
{
    lock_double();
    hold = queries;
    unlock_double();
}

/* All work in flight comes to its end. */
API void double_finish(void)
{
    lock_double();
    finish_all();
    announce_change();
    unlock_double();
}

API long double_in_flight(void)
{
    lock_double();
    long count = 0;
    for (Work *work = oldest; work; work = work->next)
        count++;
    unlock_double();
    return count;
}

/* Do kernels run their last thread first? */
API void double_run_backwards(int yes)
{
    lock_double();
    backwards = yes;
    unlock_double();
}
