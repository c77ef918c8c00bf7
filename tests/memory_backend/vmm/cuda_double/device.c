/* The device and the library: facts, names of results, and the lookup of functions. */
#include "abi.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#define DRIVER_VERSION 13000

static const struct {
    int attribute, value;
} attributes[] = {
    {1, 1024},  /* MAX_THREADS_PER_BLOCK */
    {10, 32},   /* WARP_SIZE */
    {16, 4},    /* MULTIPROCESSOR_COUNT */
    {41, 1},    /* UNIFIED_ADDRESSING */
    {75, 9},    /* COMPUTE_CAPABILITY_MAJOR */
    {76, 0},    /* COMPUTE_CAPABILITY_MINOR */
    {102, 1},   /* VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */
};

static CUresult get_attribute(int *value, int attribute, int device)
{
    if (device != 0)
        return INVALID_DEVICE;
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++) {
        if (attributes[i].attribute == attribute) {
            *value = attributes[i].value;
            return SUCCESS;
        }
    }
    return INVALID_VALUE;
}

static CUresult get_device(int *device, int ordinal)
{
    *device = 0;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

static CUresult get_name(char *name, int length, int device)
{
    if (device != 0)
        return INVALID_DEVICE;
    snprintf(name, (size_t)length, "FAKE (no GPU)");
    return SUCCESS;
}

static CUresult get_number(int *where, int number)
{
    *where = number;
    return SUCCESS;
}

static CUresult get_total(size_t *bytes, int device)
{
    *bytes = total_bytes();
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

API CUresult cuDriverGetVersion(int *version)
{
    CALL(ANYTIME, get_number(version, DRIVER_VERSION));
}

API CUresult cuDeviceGetCount(int *count)
{
    CALL(INITIALISED, get_number(count, 1));
}

API CUresult cuDeviceGet(int *device, int ordinal)
{
    CALL(INITIALISED, get_device(device, ordinal));
}

API CUresult cuDeviceGetName(char *name, int length, int device)
{
    CALL(INITIALISED, get_name(name, length, device));
}

API CUresult cuDeviceGetAttribute(int *value, int attribute, int device)
{
    CALL(INITIALISED, get_attribute(value, attribute, device));
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    CALL(INITIALISED, get_total(bytes, device));
}

/* ---- names of results ---- */

static const struct {
    CUresult result;
    const char *name, *text;
} results[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static CUresult describe(CUresult result, const char **name, const char **text)
{
    for (size_t i = 0; i < sizeof results / sizeof *results; i++) {
        if (results[i].result == result) {
            *name = results[i].name;
            *text = results[i].text;
            return SUCCESS;
        }
    }
    *name = *text = NULL;
    return INVALID_VALUE;
}

API CUresult cuGetErrorName(CUresult result, const char **name)
{
    const char *text;
    return describe(result, name, &text);
}

API CUresult cuGetErrorString(CUresult result, const char **text)
{
    const char *name;
    return describe(result, &name, text);
}

/* ---- lookup ---- */

static void *exported(const char *name)
{
    Dl_info self;
    if (!dladdr((void *)cuDriverGetVersion, &self))
        abort();
    void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    void *function = dlsym(library, name);
    dlclose(library);
    return function;
}

API CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    (void)version;
    (void)flags;
    char newest[128];
    snprintf(newest, sizeof newest, "%s_v2", symbol);
    *function = exported(newest);
    if (!*function)
        *function = exported(symbol);
    if (status)
        *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

