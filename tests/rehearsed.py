"""Imported by processes that tests start: all backends work there as in the tests' own process.

The imports take seconds, which one process spends for all that are forks of it.
"""

import conftest
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.tensor.parallel  # noqa: F401 (for its forks, as those above)

end_of_rehearsal = conftest.rehearse()  # kept, or it would end now
