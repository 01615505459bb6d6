//! Horizontal bars as SVG: one panel a group, each with a scale of its own.
//!
//! The background is filled, so the plot looks the same on a light and on a dark page. Fonts are the browser's.

use anyhow::{Context, Result};
use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{PathElement, Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{BLACK, Color, IntoFont, RGBColor, TextStyle, WHITE};

use super::bar::Bar;

/// Sizes are in pixels.
const WIDTH: i32 = 960;
const ROW: i32 = 22;
const HEAD: i32 = 34;
/// Space above a group for its name.
const GROUP: i32 = 30;
/// Where bars begin, and where the longest one ends.
const LEFT: i32 = 300;
const RIGHT: i32 = 860;
const FONT: &str = "sans-serif";

const KEPT: RGBColor = RGBColor(66, 112, 174);
const MISSED: RGBColor = RGBColor(221, 132, 56);
const LIMIT: RGBColor = RGBColor(190, 30, 45);
const GREY: RGBColor = RGBColor(110, 110, 110);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The plot as an SVG document.
pub(super) fn svg(title: &str, bars: &[Bar]) -> Result<String> {
    let groups = grouped(bars);
    let height = HEAD + groups.iter().map(|(_, bars)| GROUP + ROW * bars.len() as i32).sum::<i32>() + 2 * ROW;
    let mut document = String::new();
    {
        let area = SVGBackend::with_string(&mut document, (WIDTH as u32, height as u32)).into_drawing_area();
        draw(&area, title, &groups, height).context("cannot draw the plot")?;
        area.present().context("cannot finish the plot")?;
    }
    Ok(document)
}

/// The bars of each group, groups in the order of their first bars.
fn grouped(bars: &[Bar]) -> Vec<(&str, Vec<&Bar>)> {
    let mut groups: Vec<(&str, Vec<&Bar>)> = Vec::new();
    for bar in bars {
        match groups.iter_mut().find(|(name, _)| *name == bar.group) {
            Some((_, members)) => members.push(bar),
            None => groups.push((&bar.group, vec![bar])),
        }
    }
    groups
}

fn style(size: i32, colour: RGBColor, side: HPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour).pos(Pos::new(side, VPos::Center))
}

fn draw(area: &Area, title: &str, groups: &[(&str, Vec<&Bar>)], height: i32) -> Result<()> {
    let black = RGBColor(BLACK.0, BLACK.1, BLACK.2);
    area.fill(&WHITE)?;
    area.draw(&Text::new(title.to_owned(), (12, HEAD / 2), style(20, black, HPos::Left)))?;
    let mut top = HEAD;
    for (name, bars) in groups {
        area.draw(&Text::new((*name).to_owned(), (12, top + GROUP / 2), style(17, black, HPos::Left)))?;
        top += GROUP;
        let longest = bars.iter().flat_map(|bar| [Some(bar.value), bar.p95, bar.bound.map(super::bar::Bound::limit)]);
        let longest = longest.flatten().filter(|value| value.is_finite()).fold(f64::MIN_POSITIVE, f64::max);
        for bar in bars {
            draw_bar(area, bar, top, longest)?;
            top += ROW;
        }
        area.draw(&PathElement::new(vec![(LEFT, top - ROW * bars.len() as i32), (LEFT, top)], GREY))?;
    }
    let legend = "bar: median; whisker: 95th percentile; red line: bound; orange: bound missed";
    area.draw(&Text::new(legend, (12, height - ROW), style(15, GREY, HPos::Left)))?;
    Ok(())
}

fn draw_bar(area: &Area, bar: &Bar, top: i32, longest: f64) -> Result<()> {
    // A value that is not a number has no length, but its label still shows it.
    let x = |value: f64| LEFT + (value / longest * f64::from(RIGHT - LEFT)).clamp(0.0, 4096.0) as i32;
    let middle = top + ROW / 2;
    let black = RGBColor(BLACK.0, BLACK.1, BLACK.2);
    area.draw(&Text::new(bar.label.clone(), (LEFT - 8, middle), style(15, black, HPos::Right)))?;
    let kept = bar.bound.is_none_or(|bound| bound.holds(bar.value));
    let colour = if kept { KEPT } else { MISSED };
    area.draw(&Rectangle::new([(LEFT, top + 4), (x(bar.value), top + ROW - 4)], colour.filled()))?;
    let mut end = x(bar.value);
    if let Some(p95) = bar.p95 {
        area.draw(&PathElement::new(vec![(x(bar.value), middle), (x(p95), middle)], BLACK))?;
        area.draw(&PathElement::new(vec![(x(p95), middle - 4), (x(p95), middle + 4)], BLACK))?;
        end = end.max(x(p95));
    }
    if let Some(bound) = bar.bound {
        let at = x(bound.limit());
        area.draw(&PathElement::new(vec![(at, top + 1), (at, top + ROW - 1)], LIMIT.stroke_width(2)))?;
        end = end.max(at);
    }
    area.draw(&Text::new(number(bar.value), (end + 6, middle), style(15, black, HPos::Left)))?;
    Ok(())
}

/// A number with three significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::bar::Bound;
    use super::*;

    /// Checks that every opened tag is closed in order, and that no text holds a bare bracket or ampersand.
    fn assert_well_formed(document: &str) {
        let mut open = Vec::new();
        let mut rest = document;
        while let Some((text, tail)) = rest.split_once('<') {
            assert!(!text.contains('>'), "a bare bracket in {text:?}");
            let entities = ["&amp;", "&lt;", "&gt;", "&quot;", "&apos;"];
            let bare = text.match_indices('&').any(|(at, _)| !entities.iter().any(|e| text[at..].starts_with(e)));
            assert!(!bare, "a bare ampersand in {text:?}");
            let (tag, after) = tail.split_once('>').expect("a tag without an end");
            let name = tag.trim_start_matches('/').split_whitespace().next().unwrap().trim_end_matches('/');
            match tag {
                _ if tag.starts_with(['?', '!']) || tag.ends_with('/') => {}
                _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "{tag}"),
                _ => open.push(name),
            }
            rest = after;
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest:?}");
    }

    #[test]
    fn a_plot_is_well_formed_and_names_everything() {
        let bars = [
            Bar::new("python start, s", "native", 0.111).p95(0.15),
            Bar::new("warm, cachefs/native", "read & <mmap>", 0.9).bound(Bound::AtLeast(0.95)),
            Bar::new("python start, s", "cachefs", 123.4).p95(130.0).bound(Bound::AtMost(0.122)),
            Bar::new("warm, cachefs/native", "not measured", f64::NAN),
        ];
        let document = svg("trial", &bars).unwrap();
        assert_well_formed(&document);
        for text in
            ["trial", "python start, s", "native", "0.111", "read &amp; &lt;mmap&gt;", "0.900", "cachefs", "123", "NaN"]
        {
            assert!(document.contains(text), "{text} is not in {document}");
        }
        assert_eq!(document.matches("python start, s").count(), 1, "bars of one group are together");
        assert_eq!(document.matches("#BE1E2D").count(), 2, "a line for each bound");
    }
}
