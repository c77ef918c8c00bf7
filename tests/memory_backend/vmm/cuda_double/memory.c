/* Memory: the device's bytes are one memfd, and a mapping shows a part of it at addresses reserved with PROT_NONE.

   Stricter than a GPU: an unmap takes exactly one mapping, not several whole ones; reservations, too, are multiples of
   the granularity. As on a GPU, memory lives until it is neither mapped nor referenced, so releasing a mapped handle is
   legal; it is counted, because it turns a wrong unmap into lost bytes.
*/
#include "abi.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FRESH_BYTE 0xA5 /* memory is not zero when it is created */

typedef struct {
    int type, id;
} Location;

typedef struct {
    int type, handle_types;
    Location location;
    void *metadata;
    unsigned char flags[8];
} AllocationProp;

typedef struct {
    Location location;
    int flags;
} AccessDesc;

enum { PINNED_ALLOCATION = 1, ON_DEVICE = 1 };

static int descriptor = -1;
static size_t total;
static int released_early;

size_t total_bytes(void)
{
    return total;
}

int early_releases(void)
{
    return released_early;
}

static bool is_granular(uint64_t number)
{
    return number % GRANULE == 0;
}

static bool is_range(Address at, size_t size)
{
    return size > 0 && is_granular(at) && is_granular(size);
}

static size_t bytes_of(Kind kind)
{
    size_t bytes = 0;
    for (Object *object = first_object(kind); object; object = object->next)
        bytes += object->size;
    return bytes;
}

static size_t used_bytes(void)
{
    return bytes_of(HANDLE) + bytes_of(ALLOCATION);
}

static void *map_anonymous(void *at, size_t size, int protection, int flags)
{
    return mmap(at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
}

/* ---- reservations ---- */

/* A reserved range that starts on a multiple of `alignment`, or 0. */
static Address reserve_aligned(size_t size, size_t alignment)
{
    char *start = map_anonymous(NULL, size + alignment, PROT_NONE, 0);
    if (start == MAP_FAILED)
        return 0;
    size_t before = -(uintptr_t)start % alignment;
    if (before)
        munmap(start, before);
    munmap(start + before + size, alignment - before);
    return (Address)(uintptr_t)(start + before);
}

static CUresult reserve(Address *at, size_t size, size_t alignment, uint64_t flags)
{
    if (!is_range(0, size) || (alignment & (alignment - 1)) || flags)
        return INVALID_VALUE;
    *at = reserve_aligned(size, alignment > GRANULE ? alignment : GRANULE);
    if (!*at)
        return OUT_OF_MEMORY;
    new_object(RESERVATION, *at, size);
    return SUCCESS;
}

/* The mapping that shares a byte with [at, at + size), or NULL. */
static Object *mapping_within(Address at, size_t size)
{
    Object *mapping = first_object(MAPPING);
    while (mapping && (mapping->at >= at + size || at >= mapping->at + mapping->size))
        mapping = mapping->next;
    return mapping;
}

static CUresult free_reservation(Address at, size_t size)
{
    Object *reservation = object_over(RESERVATION, at);
    if (!reservation || reservation->at != at || reservation->size != size || mapping_within(at, size))
        return INVALID_VALUE;
    munmap((void *)(uintptr_t)at, size);
    delete_object(reservation);
    return SUCCESS;
}

/* ---- handles ---- */

static bool is_usable_prop(const AllocationProp *prop)
{
    return prop->type == PINNED_ALLOCATION && prop->location.type == ON_DEVICE && prop->location.id == 0;
}

/* Lowest offset at which `size` bytes belong to no handle; `total` or more when there is none. */
static size_t free_offset(size_t size)
{
    size_t offset = 0;
    for (Object *handle = first_object(HANDLE); handle;) {
        bool apart = handle->at >= offset + size || offset >= handle->at + handle->size;
        offset = apart ? offset : handle->at + handle->size;
        handle = apart ? handle->next : first_object(HANDLE);
    }
    return offset;
}

static bool fill_fresh(size_t offset, size_t size)
{
    void *bytes = mmap(NULL, size, PROT_WRITE, MAP_SHARED, descriptor, (off_t)offset);
    if (bytes == MAP_FAILED)
        return false;
    memset(bytes, FRESH_BYTE, size);
    return munmap(bytes, size) == 0;
}

static CUresult create(Object **handle, size_t size, const AllocationProp *prop, uint64_t flags)
{
    if (!is_range(0, size) || !is_usable_prop(prop) || flags)
        return INVALID_VALUE;
    size_t offset = free_offset(size);
    if (used_bytes() + size > total || offset + size > total || !fill_fresh(offset, size))
        return OUT_OF_MEMORY;
    *handle = new_object(HANDLE, offset, size);
    (*handle)->references = 1;
    return SUCCESS;
}

static void forget_if_unused(Object *handle)
{
    if (handle->references || handle->mappings)
        return;
    fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)handle->at, (off_t)handle->size);
    delete_object(handle);
}

static CUresult release(const void *pointer)
{
    Object *handle = find_object(HANDLE, pointer);
    if (!handle || handle->references == 0)
        return INVALID_VALUE;
    handle->references--;
    released_early += handle->references == 0 && handle->mappings > 0;
    forget_if_unused(handle);
    return SUCCESS;
}

static CUresult retain(Object **handle, Address at)
{
    Object *mapping = object_over(MAPPING, at);
    if (!mapping)
        return INVALID_VALUE;
    mapping->handle->references++;
    *handle = mapping->handle;
    return SUCCESS;
}

static CUresult granularity(size_t *bytes, const AllocationProp *prop)
{
    *bytes = GRANULE;
    return is_usable_prop(prop) ? SUCCESS : INVALID_VALUE;
}

/* ---- mappings ---- */

static CUresult map(Address at, size_t size, size_t offset, const void *pointer, uint64_t flags)
{
    Object *handle = find_object(HANDLE, pointer);
    Object *reservation = object_over(RESERVATION, at);
    if (!handle || handle->references == 0 || !is_range(at, size) || offset || size > handle->size || flags)
        return INVALID_VALUE;
    if (!reservation || size > reservation->at + reservation->size - at || mapping_within(at, size))
        return INVALID_VALUE;
    int kept = MAP_SHARED | MAP_FIXED;
    if (mmap((void *)(uintptr_t)at, size, PROT_NONE, kept, descriptor, (off_t)handle->at) == MAP_FAILED)
        return OUT_OF_MEMORY;
    Object *mapping = new_object(MAPPING, at, size);
    mapping->handle = handle;
    handle->mappings++;
    return SUCCESS;
}

static CUresult unmap(Address at, size_t size)
{
    Object *mapping = object_over(MAPPING, at);
    if (!mapping || mapping->at != at || mapping->size != size)
        return INVALID_VALUE;
    if (in_flight(at, size))
        poison(ILLEGAL_ADDRESS);
    if (map_anonymous((void *)(uintptr_t)at, size, PROT_NONE, MAP_FIXED) == MAP_FAILED)
        return OUT_OF_MEMORY;
    mapping->handle->mappings--;
    forget_if_unused(mapping->handle);
    delete_object(mapping);
    return SUCCESS;
}

/* Is [at, at + size) made of whole mappings without a hole? */
static bool covers_whole_mappings(Address at, size_t size)
{
    for (Address next = at; next < at + size;) {
        Object *mapping = object_over(MAPPING, next);
        if (!mapping || mapping->at != next || next + mapping->size > at + size)
            return false;
        next += mapping->size;
    }
    return size > 0;
}

static CUresult set_access(Address at, size_t size, const AccessDesc *descs, size_t count)
{
    if (count != 1 || descs->location.type != ON_DEVICE || descs->location.id != 0)
        return INVALID_VALUE;
    int access = descs->flags;
    if ((access != ACCESS_NONE && access != ACCESS_READ && access != ACCESS_READ_WRITE) ||
        !covers_whole_mappings(at, size))
        return INVALID_VALUE;
    int protection = access == ACCESS_NONE ? PROT_NONE : access == ACCESS_READ ? PROT_READ : PROT_READ | PROT_WRITE;
    if (mprotect((void *)(uintptr_t)at, size, protection))
        return OUT_OF_MEMORY;
    for (Object *mapping = first_object(MAPPING); mapping; mapping = mapping->next)
        if (mapping->at >= at && mapping->at < at + size)
            mapping->access = access;
    return SUCCESS;
}

static CUresult get_access(uint64_t *flags, const Location *location, Address at)
{
    Object *mapping = object_over(MAPPING, at);
    if (!mapping || location->type != ON_DEVICE || location->id != 0)
        return INVALID_VALUE;
    *flags = (uint64_t)mapping->access;
    return SUCCESS;
}

/* ---- plain allocations, on the device and pinned on the host ---- */

static CUresult allocate(Kind kind, Address *at, size_t size)
{
    if (size == 0)
        return INVALID_VALUE;
    if (kind == ALLOCATION && used_bytes() + size > total)
        return OUT_OF_MEMORY;
    void *bytes = map_anonymous(NULL, size, PROT_READ | PROT_WRITE, 0);
    if (bytes == MAP_FAILED)
        return OUT_OF_MEMORY;
    memset(bytes, FRESH_BYTE, size);
    *at = (Address)(uintptr_t)bytes;
    new_object(kind, *at, size);
    return SUCCESS;
}

static CUresult free_allocation(Kind kind, Address at)
{
    Object *allocation = object_over(kind, at);
    if (!allocation || allocation->at != at)
        return INVALID_VALUE;
    finish_all(); /* as on a GPU, freeing waits for the work in flight */
    munmap((void *)(uintptr_t)at, allocation->size);
    delete_object(allocation);
    return SUCCESS;
}

static CUresult allocate_pinned(void **at, size_t size)
{
    Address address = 0;
    CUresult result = allocate(PINNED, &address, size);
    *at = (void *)(uintptr_t)address;
    return result;
}

static CUresult get_info(size_t *free_size, size_t *total_size)
{
    *total_size = total;
    *free_size = total - used_bytes();
    return SUCCESS;
}

/* ---- what copies may touch ---- */

/* Bytes from `at` on that can be reached with `access`. */
static size_t reach(Address at, int access)
{
    Object *range = object_over(MAPPING, at);
    if (range && (range->access & access) != access)
        return 0;
    if (!range)
        range = object_over(ALLOCATION, at);
    if (!range)
        range = object_over(PINNED, at);
    return range ? range->at + range->size - at : 0;
}

bool is_accessible(Address at, size_t size, int access)
{
    for (size_t done = 0; done < size;) {
        size_t more = reach(at + done, access);
        if (!more)
            return false;
        done += more;
    }
    return true;
}

bool is_pinned(const void *at, size_t size)
{
    Address address = (Address)(uintptr_t)at;
    Object *pinned = object_over(PINNED, address);
    return pinned && address + size <= pinned->at + pinned->size;
}

void reset_memory(size_t bytes)
{
    for (Kind kind = RESERVATION; kind <= PINNED; kind++) {
        while (first_object(kind)) {
            Object *object = first_object(kind);
            if (kind == RESERVATION || kind == ALLOCATION || kind == PINNED)
                munmap((void *)(uintptr_t)object->at, object->size);
            delete_object(object);
        }
    }
    if (descriptor >= 0)
        close(descriptor);
    descriptor = memfd_create("cuda-double", MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, (off_t)bytes))
        abort();
    total = bytes;
    released_early = 0;
}

/* ---- the calls ---- */

API CUresult cuMemGetInfo_v2(size_t *free_size, size_t *total_size)
{
    CALL(CURRENT_CONTEXT, get_info(free_size, total_size));
}

API CUresult cuMemGetAllocationGranularity(size_t *bytes, const AllocationProp *prop, int option)
{
    (void)option;
    CALL(CURRENT_CONTEXT, granularity(bytes, prop));
}

API CUresult cuMemAddressReserve(Address *at, size_t size, size_t alignment, Address hint, uint64_t flags)
{
    (void)hint;
    CALL(CURRENT_CONTEXT, reserve(at, size, alignment, flags));
}

API CUresult cuMemAddressFree(Address at, size_t size)
{
    CALL(CURRENT_CONTEXT, free_reservation(at, size));
}

API CUresult cuMemCreate(Object **handle, size_t size, const AllocationProp *prop, uint64_t flags)
{
    CALL(CURRENT_CONTEXT, create(handle, size, prop, flags));
}

API CUresult cuMemRelease(const void *handle)
{
    CALL(CURRENT_CONTEXT, release(handle));
}

API CUresult cuMemRetainAllocationHandle(Object **handle, void *at)
{
    CALL(CURRENT_CONTEXT, retain(handle, (Address)(uintptr_t)at));
}

API CUresult cuMemMap(Address at, size_t size, size_t offset, const void *handle, uint64_t flags)
{
    CALL(CURRENT_CONTEXT, map(at, size, offset, handle, flags));
}

API CUresult cuMemUnmap(Address at, size_t size)
{
    CALL(CURRENT_CONTEXT, unmap(at, size));
}

API CUresult cuMemSetAccess(Address at, size_t size, const AccessDesc *descs, size_t count)
{
    CALL(CURRENT_CONTEXT, set_access(at, size, descs, count));
}

API CUresult cuMemGetAccess(uint64_t *flags, const Location *location, Address at)
{
    CALL(CURRENT_CONTEXT, get_access(flags, location, at));
}

API CUresult cuMemAlloc_v2(Address *at, size_t size)
{
    CALL(CURRENT_CONTEXT, allocate(ALLOCATION, at, size));
}

API CUresult cuMemFree_v2(Address at)
{
    CALL(CURRENT_CONTEXT, free_allocation(ALLOCATION, at));
}

API CUresult cuMemHostAlloc(void **at, size_t size, unsigned flags)
{
    (void)flags;
    CALL(CURRENT_CONTEXT, allocate_pinned(at, size));
}

API CUresult cuMemFreeHost(void *at)
{
    CALL(CURRENT_CONTEXT, free_allocation(PINNED, (Address)(uintptr_t)at));
}
