//! Text in columns.

/// Lines of cells, each column as wide as its widest cell; the last one is not padded.
pub fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |text: &str| text.chars().count();
    let mut widths = [0; N];
    for line in lines {
        for (widest, cell) in widths.iter_mut().zip(line) {
            *widest = width(cell).max(*widest);
        }
    }
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (cell, widest) in line.iter().zip(widths) {
            row.push_str(cell);
            row.extend(std::iter::repeat_n(' ', widest - width(cell) + 2));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_are_aligned_and_lines_not_padded() {
        let lines = [["A".to_owned(), "B".to_owned()], ["äöü".to_owned(), "x".to_owned()]];
        assert_eq!(super::columns(&lines), "A    B\näöü  x\n");
    }
}
