#define LEVEL avx2
#include "vector_avx2.h"

#include "search.h"
