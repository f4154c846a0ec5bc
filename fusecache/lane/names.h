/* Names that the origin's kernel has in memory: who asks for one needs no thread of Python, which
 * waits for the origin. */
#ifndef FUSECACHE_NAMES_H
#define FUSECACHE_NAMES_H

#include <stdbool.h>

#include "request.h"

struct lane;

/* Looks a name up, if that takes neither the origin nor a disk. True: there is none, and the request
 * is answered. False: it is Python's, with a descriptor of what was found, if anything was. */
bool names_find(struct lane *lane, struct request *request);

/* Nobody will take the request: closes what was found. */
void names_drop(const struct request *request);

#endif
