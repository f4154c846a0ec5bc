/* Attributes: questions for those that are as Python has told them last, for free space, and the
 * moment that reads wait after a question. */
#ifndef FUSECACHE_ATTRIBUTES_H
#define FUSECACHE_ATTRIBUTES_H

#include <stdbool.h>
#include <stdint.h>

#include "request.h"

struct lane;

/* What Python has told of a node, or would tell; in a table by number. */
struct told {
    uint64_t node; /* 0: nothing */
    int fd;        /* Python's */
    struct fuse_attr_out answer;
};

/* Answers with what was told last, if it would be told again: the descriptor has the same
 * attributes still. Those of a directory are told as they are now, since nothing else goes into
 * them. False: it is Python's. */
bool attributes_tell(struct lane *lane, const struct request *request);

/* Answers with the space of the origin, if Python has told the attributes of its root: then nobody
 * has to be asked who may hang. False: it is Python's. */
bool attributes_space(struct lane *lane, const struct request *request);

/* Python answers this request now. */
void attributes_told(struct lane *lane, uint64_t unique);

/* Python would tell this again as long as the descriptor's attributes stay; until it says
 * otherwise. */
void attributes_keep(struct lane *lane, const struct told *told);
void attributes_drop(struct lane *lane, uint64_t node);

/* After a question for attributes the next read waits a moment, for the reason that the docstring
 * of Operations.read gives. False: it has to, and this thread may not. */
bool attributes_overtake(struct lane *lane, uint32_t gate, bool may_wait);

#endif
