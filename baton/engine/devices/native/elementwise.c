/* What lies between matrix products: norms, rotary embedding and the way into the cache, gating, the table, the largest logit.
 * Results are rounded where torch rounds them, so that they equal those of the torch path, bit for bit but for the order of sums. */
#define BODY "elementwise_of.h"
#include "each_element.h"
