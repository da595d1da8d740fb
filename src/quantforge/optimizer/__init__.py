"""Settings found by measuring.

api        optimize, recommend: for vectors and for models
knapsack   bits for each slot under a budget of bytes, exactly
reward     one number for accuracy, memory and latency; points that no other beats

vectors    codes and indexes: space, sample, measure, policies, vector_result
caches     bits of keys and values by layer: slots, probe, cache_result
"""

from quantforge.optimizer.advice import Recommendation
from quantforge.optimizer.api import optimize, recommend
from quantforge.optimizer.knapsack import allocate
from quantforge.optimizer.reward import OBJECTIVES, Weights
from quantforge.optimizer.space import Space

__all__ = ["OBJECTIVES", "Recommendation", "Space", "Weights", "allocate", "optimize", "recommend"]
