#define LEVEL portable
#include "vector_portable.h"

#include "search.h"
