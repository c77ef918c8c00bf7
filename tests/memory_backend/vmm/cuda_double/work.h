/* Work in flight, as the files share it that launch work and wait for it. */
#pragma once

#include "abi.h"

#define NON_BLOCKING 1u /* a stream that keeps no order with the default stream */

typedef enum { COPY, FILL, LAUNCH, RECORD, WAIT } WorkKind;

typedef struct Work {
    struct Work *next; /* launched later */
    WorkKind kind;
    uint64_t serial;
    uint64_t stream;  /* 0: the default stream */
    bool blocking;    /* of the stream: does it keep order with the default stream? */
    long queries;     /* that will still hear NOT_READY */
    bool still;       /* scratch of stands_still */
    uint64_t awaited; /* WAIT: serial of the RECORD */
    Address target, source;
    size_t size;
    void *staged; /* COPY: the source's bytes, taken at launch */
    unsigned char byte;
    const Kernel *kernel;
    Extent grid, block;
    void *parameters[MAX_PARAMETERS];
} Work;

/* Is that a stream? 0 and CU_STREAM_LEGACY are the default stream. */
bool is_stream(const void *stream);
/* The number of a stream; 0 is the default stream's. */
uint64_t stream_number(const Object *stream);

Work *new_work(WorkKind kind, const Object *stream);
CUresult launch(Work *work);

/* The work with that serial if it is still in flight, or NULL. */
Work *find_work(uint64_t serial);
Work *last_on_stream(uint64_t stream);
/* What a query for `work` (NULL: it has ended) says. */
CUresult query(Work *work);
/* Returns when `work` (NULL: it has ended) has ended. */
CUresult synchronise(Work *work);
CUresult synchronise_all(void);

/* Deletes an object of which nothing else is left to give back. */
CUresult destroy(Kind kind, const void *pointer);
