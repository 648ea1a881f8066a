/* Which sources this library was made of. BATON_SOURCES is given by build.py. */
#include "element.h"

EXPORT const char *baton_sources(void) { return BATON_SOURCES; }
