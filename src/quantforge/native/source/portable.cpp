#define LEVEL portable
#include "vector_portable.h"

#include "level.h"
