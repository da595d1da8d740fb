#define LEVEL avx512
#include "vector_avx512.h"

#include "search.h"
