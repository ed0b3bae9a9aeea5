"""The steps of a recurrent layer (see the pass `split-recurrent`): its weights are quantized, its state is not."""

from inc_graph.oppattern import OpPattern, register_pattern
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS, PROJECTION

register_pattern(OpPattern("lstm_steps", (LSTM_STEPS,), inputs=(), weight=3))
register_pattern(OpPattern("gru_steps", (GRU_STEPS,), inputs=(), weight=2, bias=3))
register_pattern(OpPattern("projection", (PROJECTION,), inputs=(), weight=0))
