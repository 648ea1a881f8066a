/* Drawing ids from rows of logits. */
#define BODY "sampling_of.h"
#include "each_element.h"
