/* Device code: of the PTX only the entries are read; what runs is its source, compiled for the CPU (kernels.cpp). */
#include "work.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_THREADS_PER_BLOCK 1024u

/* What cuModuleGetFunction hands out lives as long as its module's text: a kernel has no state of its own. */
static CUresult load_module(Object **module, const char *image)
{
    if (!strstr(image, ".version") || !strstr(image, ".target"))
        return INVALID_IMAGE;
    *module = new_object(MODULE, 0, 0);
    (*module)->text = strdup(image);
    return SUCCESS;
}

/* Bytes of the parameter whose declaration goes on at `at`: " .u64 name" or " .align 8 .b8 name[24]". */
static size_t parameter_size(const char *at)
{
    unsigned bits = 0;
    if (sscanf(at, " .align %*u .%*c%u", &bits) != 1 && sscanf(at, " .%*c%u", &bits) != 1)
        return 0;
    const char *end = at + strcspn(at, "[,)");
    return bits / 8 * (*end == '[' ? strtoul(end + 1, NULL, 10) : 1);
}

/* Does the PTX declare parameters of exactly the sizes that the source has? */
static bool has_parameters(const char *entry, const Kernel *kernel)
{
    const char *end = strchr(entry, ')');
    int found = 0;
    for (const char *at = entry; (at = strstr(at, ".param")) && at < end; found++) {
        at += strlen(".param");
        if (found == kernel->parameters || parameter_size(at) != kernel->sizes[found])
            return false;
    }
    return end && found == kernel->parameters;
}

/* The text behind `.entry name`, or NULL. */
static const char *find_entry(const char *ptx, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = ptx; (at = strstr(at, ".entry")); at++) {
        const char *found = at + strlen(".entry");
        found += strspn(found, " \t\n");
        if (!strncmp(found, name, length) && strspn(found + length, " \t\n("))
            return found + length;
    }
    return NULL;
}

static CUresult get_function(const Kernel **function, const Object *module, const char *name)
{
    if (!find_object(MODULE, module))
        return INVALID_HANDLE;
    const char *entry = find_entry(module->text, name);
    const Kernel *kernel = entry ? find_kernel(name) : NULL;
    if (!kernel)
        return NOT_FOUND;
    *function = kernel;
    return has_parameters(entry, kernel) ? SUCCESS : INVALID_IMAGE;
}

static CUresult launch_kernel(const Kernel *kernel, Extent grid, Extent block, void **parameters, const Object *stream)
{
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    bool empty = threads == 0 || (uint64_t)grid.x * grid.y * grid.z == 0;
    if (!kernel || find_kernel(kernel->name) != kernel || empty || threads > MAX_THREADS_PER_BLOCK)
        return INVALID_VALUE;
    if (!is_stream(stream))
        return INVALID_HANDLE;
    Work *work = new_work(LAUNCH, stream);
    work->kernel = kernel;
    work->grid = grid;
    work->block = block;
    for (int i = 0; i < kernel->parameters; i++) {
        work->parameters[i] = malloc(kernel->sizes[i]);
        if (!work->parameters[i])
            abort();
        memcpy(work->parameters[i], parameters[i], kernel->sizes[i]);
    }
    return launch(work);
}

API CUresult cuModuleLoadData(Object **module, const void *image)
{
    CALL(CURRENT_CONTEXT, load_module(module, image));
}

API CUresult cuModuleUnload(const void *module)
{
    CALL(CURRENT_CONTEXT, destroy(MODULE, module));
}

API CUresult cuModuleGetFunction(const Kernel **function, const Object *module, const char *name)
{
    CALL(CURRENT_CONTEXT, get_function(function, module, name));
}

API CUresult cuLaunchKernel(const Kernel *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                            const Object *stream, void **parameters, void **extra)
{
    (void)shared;
    (void)extra;
    Extent grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    CALL(CURRENT_CONTEXT, launch_kernel(function, grid, block, parameters, stream));
}

