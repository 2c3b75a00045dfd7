//! The results as a picture: for each metric, every subject's ratio to the reference on a
//! logarithmic axis. To the right is better.

use super::report::{number, Results, Row};
use std::fmt::Write as _;

const LEFT: f64 = 250.0;
const WIDTH: f64 = 620.0;
const ROW: f64 = 22.0;
const TOP: f64 = 70.0;
/// The axis reaches from `1 / SPAN` to `SPAN`.
const SPAN: f64 = 64.0;

const COLOURS: &[&str] =
    &["#1b6ca8", "#777777", "#e08e0b", "#3a9d5d", "#a64ca6", "#bbbbbb", "#333333"];

/// An SVG image.
pub fn svg(results: &Results, reference: &str) -> String {
    let rows: Vec<&Row> =
        results.rows.iter().filter(|row| row.is_speed && row.median(reference).is_some()).collect();
    let bottom = TOP + ROW * rows.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"15\">Times better than {reference} \
         (logarithmic; right is better)</text>\n",
        LEFT + WIDTH + 30.0,
        bottom + 40.0
    );
    axis(&mut out, bottom);
    for (index, row) in rows.iter().enumerate() {
        let y = TOP + ROW * (index as f64 + 0.5);
        let unit = row.unit;
        let value = row.median(reference).map(number).unwrap_or_default();
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} ({value} {unit})</text>",
            LEFT - 10.0,
            y + 4.0,
            escape(&row.name)
        );
        for (subject, colour) in results.subjects.iter().zip(COLOURS.iter().cycle()) {
            let Some(ratio) = row.ratio(subject, reference) else { continue };
            let radius = if subject == "cairn" { 6 } else { 4 };
            let _ = writeln!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{y}\" r=\"{radius}\" fill=\"{colour}\" \
                 fill-opacity=\"0.85\"><title>{} {ratio:.2}x</title></circle>",
                place(ratio),
                escape(subject)
            );
        }
    }
    legend(&mut out, results, reference);
    out.push_str("</svg>\n");
    out
}

fn axis(out: &mut String, bottom: f64) {
    let mut tick = 1.0 / SPAN;
    while tick <= SPAN {
        let x = place(tick);
        let colour = if tick == 1.0 { "#555555" } else { "#e2e2e2" };
        let label = if tick < 1.0 { format!("1/{:.0}", 1.0 / tick) } else { format!("{tick:.0}") };
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"{colour}\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555555\">{label}</text>",
            bottom + 16.0
        );
        tick *= 2.0;
    }
}

fn legend(out: &mut String, results: &Results, reference: &str) {
    let mut x = LEFT;
    for (subject, colour) in results.subjects.iter().zip(COLOURS.iter().cycle()) {
        let mean = results.mean_ratio(subject, reference);
        let mean = mean.map_or_else(String::new, |(mean, _)| format!(" {mean:.2}x"));
        let text = format!("{subject}{mean}");
        let _ = writeln!(
            out,
            "<circle cx=\"{x}\" cy=\"46\" r=\"5\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"50\">{}</text>",
            x + 9.0,
            escape(&text)
        );
        x += 30.0 + 7.0 * text.len() as f64;
    }
}

/// Where a ratio is on the axis; what is beyond its ends is at the end.
fn place(ratio: f64) -> f64 {
    let share = (ratio.clamp(1.0 / SPAN, SPAN).ln() / SPAN.ln() + 1.0) / 2.0;
    LEFT + share * WIDTH
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_in_the_middle_and_extremes_stay_on_the_axis() {
        assert!((place(1.0) - (LEFT + WIDTH / 2.0)).abs() < 1e-9);
        assert!((place(1e9) - (LEFT + WIDTH)).abs() < 1e-9);
        assert!((place(1e-9) - LEFT).abs() < 1e-9);
        assert!(place(2.0) > place(1.5));
    }
}
