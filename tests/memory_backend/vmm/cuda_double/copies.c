/* Copies and fills: both ranges have to be accessible when they are launched, and still when they are done. */
#include "work.h"

#include <stdlib.h>
#include <string.h>

static CUresult copy(Address target, Address source, void *staged, size_t size, const Object *stream)
{
    Work *work = new_work(COPY, stream);
    work->target = target;
    work->source = source;
    work->staged = staged;
    work->size = size;
    return launch(work);
}

static CUresult copy_within_device(Address target, Address source, size_t size, const Object *stream)
{
    if (!is_stream(stream) || !is_accessible(target, size, ACCESS_READ_WRITE) ||
        !is_accessible(source, size, ACCESS_READ))
        return INVALID_VALUE;
    return copy(target, source, NULL, size, stream);
}

/* Bytes that are not pinned are taken at the launch, as the driver does through a buffer of its own. */
static CUresult copy_to_device(Address target, const void *source, size_t size, const Object *stream)
{
    if (!is_stream(stream) || !is_accessible(target, size, ACCESS_READ_WRITE))
        return INVALID_VALUE;
    void *staged = NULL;
    if (!is_pinned(source, size)) {
        staged = malloc(size ? size : 1);
        if (!staged)
            abort();
        memcpy(staged, source, size);
    }
    return copy(target, (Address)(uintptr_t)source, staged, size, stream);
}

/* A target that is not pinned makes the call wait. */
static CUresult copy_to_host(void *target, Address source, size_t size, const Object *stream)
{
    if (!is_stream(stream) || !is_accessible(source, size, ACCESS_READ))
        return INVALID_VALUE;
    if (is_pinned(target, size))
        return copy((Address)(uintptr_t)target, source, NULL, size, stream);
    CUresult result = synchronise(last_on_stream(stream_number(stream)));
    if (!result && stream_number(stream) == 0)
        result = synchronise_all();
    if (!result && !is_accessible(source, size, ACCESS_READ))
        result = INVALID_VALUE;
    if (!result)
        memcpy(target, (void *)(uintptr_t)source, size);
    return result;
}

static CUresult then_wait(CUresult result)
{
    return result ? result : synchronise(last_on_stream(0));
}

static CUresult fill(Address target, unsigned char byte, size_t size, const Object *stream)
{
    if (!is_stream(stream) || !is_accessible(target, size, ACCESS_READ_WRITE))
        return INVALID_VALUE;
    Work *work = new_work(FILL, stream);
    work->target = target;
    work->byte = byte;
    work->size = size;
    return launch(work);
}

API CUresult cuMemcpyHtoD_v2(Address target, const void *source, size_t size)
{
    CALL(CURRENT_CONTEXT, then_wait(copy_to_device(target, source, size, NULL)));
}

API CUresult cuMemcpyHtoDAsync_v2(Address target, const void *source, size_t size, const Object *stream)
{
    CALL(CURRENT_CONTEXT, copy_to_device(target, source, size, stream));
}

API CUresult cuMemcpyDtoH_v2(void *target, Address source, size_t size)
{
    CALL(CURRENT_CONTEXT, then_wait(copy_to_host(target, source, size, NULL)));
}

API CUresult cuMemcpyDtoHAsync_v2(void *target, Address source, size_t size, const Object *stream)
{
    CALL(CURRENT_CONTEXT, copy_to_host(target, source, size, stream));
}

/* As on a GPU, neither this nor cuMemsetD8 waits for the device. */
API CUresult cuMemcpyDtoD_v2(Address target, Address source, size_t size)
{
    CALL(CURRENT_CONTEXT, copy_within_device(target, source, size, NULL));
}

API CUresult cuMemcpyDtoDAsync_v2(Address target, Address source, size_t size, const Object *stream)
{
    CALL(CURRENT_CONTEXT, copy_within_device(target, source, size, stream));
}

API CUresult cuMemsetD8_v2(Address target, unsigned char byte, size_t size)
{
    CALL(CURRENT_CONTEXT, fill(target, byte, size, NULL));
}

API CUresult cuMemsetD8Async(Address target, unsigned char byte, size_t size, const Object *stream)
{
    CALL(CURRENT_CONTEXT, fill(target, byte, size, stream));
}

