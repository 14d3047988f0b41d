"""Imported by processes that tests start: all backends work there as in the tests' own process."""

import conftest

end_of_rehearsal = conftest.rehearse()  # kept, or it would end now
