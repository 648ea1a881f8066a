/* Drawing ids from rows of logits. */
#define BODY "sampling_of.h"
#include "each_element.h"

/* How many ids are summed together: what Python sizes the memory for sums by. */
EXPORT int draw_part(void) { return PART; }
