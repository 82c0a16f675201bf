//! Pictures for the page of figures.

use plotters::prelude::*;

use crate::Chores;
use crate::shell::ChoreError;

const SIZE: (u32, u32) = (720, 400);
/// Told apart also without colours: by their markers and the names beside them.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 90, 181), RGBColor(220, 110, 20)];

/// Named lines through points, as SVG.
pub fn lines(title: &str, across: &str, up: &str, lines: &[(&str, &[(usize, f64)])]) -> Chores<String> {
    let mut picture = String::new();
    draw(&mut picture, title, (across, up), lines)
        .map_err(|error| ChoreError::Found(format!("the picture {title:?} cannot be drawn: {error}")))?;
    Ok(picture)
}

fn draw(
    picture: &mut String,
    title: &str,
    (across, up): (&str, &str),
    lines: &[(&str, &[(usize, f64)])],
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let right = points().map(|(x, _)| *x).max().unwrap_or(1);
    let top = points().map(|(_, y)| *y).fold(f64::MIN_POSITIVE, f64::max) * 1.1;
    let area = SVGBackend::with_string(picture, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0..right + 1, 0.0..top)?;
    chart.configure_mesh().x_desc(across).y_desc(up).light_line_style(TRANSPARENT).draw()?;
    for ((name, points), colour) in lines.iter().zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(4))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picture_has_its_title_axes_and_lines() {
        let picture =
            lines("Starts", "pods", "seconds", &[("kata", &[(1, 2.0), (5, 6.0)]), ("runc", &[(1, 0.1)])]);
        let picture = picture.unwrap();
        for text in ["<svg", "Starts", "pods", "seconds", "kata", "runc", "<polyline"] {
            assert!(picture.contains(text), "{text}");
        }
    }
}
