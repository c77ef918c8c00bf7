/* Streams and events: what orders work, and what says that it has ended. */
#include "work.h"

#define NO_TIMING 2u

static uint64_t stream_serials;

/* ---- streams ---- */

static CUresult create_stream(Object **stream, unsigned flags)
{
    if (flags & ~NON_BLOCKING)
        return INVALID_VALUE;
    *stream = new_object(STREAM, 0, 0);
    (*stream)->flags = flags;
    (*stream)->serial = ++stream_serials;
    return SUCCESS;
}

/* Work in flight outlives its stream. The use of what was destroyed is refused; on a GPU it is not defined. */
CUresult destroy(Kind kind, const void *pointer)
{
    Object *object = find_object(kind, pointer);
    if (!object)
        return INVALID_HANDLE;
    delete_object(object);
    return SUCCESS;
}

static CUresult query_stream(const Object *stream)
{
    return is_stream(stream) ? query(last_on_stream(stream_number(stream))) : INVALID_HANDLE;
}

static CUresult synchronise_stream(const Object *stream)
{
    return is_stream(stream) ? synchronise(last_on_stream(stream_number(stream))) : INVALID_HANDLE;
}

API CUresult cuStreamCreate(Object **stream, unsigned flags)
{
    CALL(CURRENT_CONTEXT, create_stream(stream, flags));
}

API CUresult cuStreamDestroy_v2(const void *stream)
{
    CALL(CURRENT_CONTEXT, destroy(STREAM, stream));
}

API CUresult cuStreamQuery(const Object *stream)
{
    CALL(CURRENT_CONTEXT, query_stream(stream));
}

API CUresult cuStreamSynchronize(const Object *stream)
{
    CALL(CURRENT_CONTEXT, synchronise_stream(stream));
}

API CUresult cuCtxSynchronize(void)
{
    CALL(CURRENT_CONTEXT, synchronise_all());
}

/* ---- events ---- */

static CUresult create_event(Object **event, unsigned flags)
{
    *event = new_object(EVENT, 0, 0);
    (*event)->flags = flags;
    return SUCCESS;
}

static CUresult record_event(Object *event, const Object *stream)
{
    if (!find_object(EVENT, event) || !is_stream(stream))
        return INVALID_HANDLE;
    Work *work = new_work(RECORD, stream);
    event->serial = work->serial;
    return launch(work);
}

static CUresult wait_for_event(const Object *stream, const Object *event)
{
    if (!find_object(EVENT, event) || !is_stream(stream))
        return INVALID_HANDLE;
    Work *work = new_work(WAIT, stream);
    work->awaited = event->serial;
    return launch(work);
}

static CUresult query_event(const Object *event)
{
    return find_object(EVENT, event) ? query(find_work(event->serial)) : INVALID_HANDLE;
}

static CUresult synchronise_event(const Object *event)
{
    return find_object(EVENT, event) ? synchronise(find_work(event->serial)) : INVALID_HANDLE;
}

static bool is_timed(const Object *event)
{
    return find_object(EVENT, event) && event->serial && !(event->flags & NO_TIMING);
}

static CUresult elapsed(float *milliseconds, const Object *start, const Object *end)
{
    if (!is_timed(start) || !is_timed(end))
        return INVALID_HANDLE;
    if (find_work(start->serial) || find_work(end->serial))
        return NOT_READY;
    *milliseconds = (float)(1e3 * (end->seconds - start->seconds));
    return SUCCESS;
}

API CUresult cuEventCreate(Object **event, unsigned flags)
{
    CALL(CURRENT_CONTEXT, create_event(event, flags));
}

API CUresult cuEventDestroy_v2(const void *event)
{
    CALL(CURRENT_CONTEXT, destroy(EVENT, event));
}

API CUresult cuEventRecord(Object *event, const Object *stream)
{
    CALL(CURRENT_CONTEXT, record_event(event, stream));
}

API CUresult cuStreamWaitEvent(const Object *stream, const Object *event, unsigned flags)
{
    (void)flags;
    CALL(CURRENT_CONTEXT, wait_for_event(stream, event));
}

API CUresult cuEventQuery(const Object *event)
{
    CALL(CURRENT_CONTEXT, query_event(event));
}

API CUresult cuEventSynchronize(const Object *event)
{
    CALL(CURRENT_CONTEXT, synchronise_event(event));
}

API CUresult cuEventElapsedTime_v2(float *milliseconds, const Object *start, const Object *end)
{
    CALL(CURRENT_CONTEXT, elapsed(milliseconds, start, end));
}

