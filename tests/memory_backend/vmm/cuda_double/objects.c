/* Everything that a caller can leak, in one list per kind. */
#include "abi.h"

#include <stdlib.h>

static Object *live[KINDS];

Object *new_object(Kind kind, Address at, size_t size)
{
    Object *object = calloc(1, sizeof *object);
    if (!object)
        abort();
    object->kind = kind;
    object->at = at;
    object->size = size;
    object->next = live[kind];
    live[kind] = object;
    return object;
}

void delete_object(Object *object)
{
    Object **link = &live[object->kind];
    while (*link != object)
        link = &(*link)->next;
    *link = object->next;
    free(object->text);
    free(object);
}

Object *first_object(Kind kind)
{
    return live[kind];
}

Object *find_object(Kind kind, const void *pointer)
{
    Object *object = live[kind];
    while (object && object != pointer)
        object = object->next;
    return object;
}

Object *object_over(Kind kind, Address at)
{
    Object *object = live[kind];
    while (object && (at < object->at || at - object->at >= object->size))
        object = object->next;
    return object;
}

API long double_live(int kind)
{
    lock_double();
    long count = 0;
    for (Object *object = live[kind]; object; object = object->next)
        count++;
    unlock_double();
    return count;
}
