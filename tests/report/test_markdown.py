from helpers.audits import EVIL, read_table

from salun_sd.report.markdown import table
from salun_sd.runtime.escape import code


def test_tables_keep_their_columns_whatever_cells_hold():
    rows = read_table("# x\n" + table([code(EVIL), "b"], [[code("|" * 3), "x|y"]]), "# x")
    assert rows == [[code(EVIL), "b"], ["---", "---"], [code("|||"), "x|y"]]
