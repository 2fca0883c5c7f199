"""How do tests run a captured generation step without a GPU? Operator by operator, with the graph's fixed shapes."""

from pyfused.generation.steps import GraphSteps


class Replayed(GraphSteps):
    """Runs the step instead of replaying it as a GPU would."""

    def _capture(self):
        self.replay = self._step
        return self
