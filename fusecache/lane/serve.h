/* What the lane does with one request, and with one answer of pyfuse3. */
#ifndef FUSECACHE_SERVE_H
#define FUSECACHE_SERVE_H

#include "lane.h"

#define WAITING 40000 /* requests that may wait for Python: more than max_background */

/* Serves requests until the kernel has no more. The caller is one of ``readers``. */
void serve(struct lane *lane, struct buffer *buffer);

/* Serves one request that lies at ``message``, in the room of an entry. */
void serve_request(struct lane *lane, char *message, size_t size, struct buffer *buffer,
                   struct found *found);

/* Hands what pyfuse3 has answered to the kernel. Waits for nothing but what the kernel does with an
 * answer. For one thread at a time, the one in which pyfuse3 runs. */
void serve_answers(struct lane *lane);

/* Answers a read with what was read, if all of it is still what the image holds. False: it is not,
 * nothing is answered. */
bool serve_hit(struct lane *lane, const struct request *request, uint32_t gate,
               const struct found *found, const char *data, bool cold, uint64_t began);

/* -- of lane.c, for serve.c and cold.c -- */

/* Queues a request for Python. Returns the buffer to go on with: another one, if it has data that
 * is not in the room of an entry. */
struct buffer *lane_queue(struct lane *lane, const struct request *request, struct buffer *buffer);

/* Whether this thread may wait for the device now, because another one can read meanwhile. */
bool lane_step_back(struct lane *lane);

/* Waits until a reader is needed; false at the end. was_back: after lane_step_back said yes. */
bool lane_step_up(struct lane *lane, bool was_back);

/* No more requests are served, and Python hears of it. */
void lane_end(struct lane *lane);

/* Whether there are too many readers; then this one is none any more, until it steps up. */
bool lane_step_aside(struct lane *lane);

#endif
