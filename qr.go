package main

import (
	"fmt"

	"github.com/skip2/go-qrcode"
)

// level is how much of a QR code may be damaged. A screen damages nothing, and
// at Low the modules are the largest, so a camera reads them from farther away.
const level = qrcode.Low

// modulePixels is the width of a module in the PNG: whole, so that edges are sharp.
const modulePixels = 4

// qrPNG draws a QR code with the border of 4 white modules that scanners need.
// Like its siblings, it fails when the text is too long, beyond some 2,900 bytes.
func qrPNG(text string) ([]byte, error) {
	q, err := qrcode.New(text, level)
	if err != nil {
		return nil, err
	}
	return q.PNG(-modulePixels)
}

// qrSVG draws a QR code as one path, black on white, sharp at any size.
func qrSVG(text string) ([]byte, error) {
	q, err := qrcode.New(text, level)
	if err != nil {
		return nil, err
	}
	modules := q.Bitmap() // with the border
	size := len(modules)
	svg := fmt.Appendf(nil,
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %[1]d %[1]d" shape-rendering="crispEdges">`+
			`<path fill="#fff" d="M0 0h%[1]dv%[1]dH0z"/><path d="`, size)
	for y, row := range modules {
		for x := 0; x < size; x++ {
			start := x
			for x < size && row[x] {
				x++
			}
			if x > start { // a run of dark modules
				svg = fmt.Appendf(svg, "M%d %dh%dv1h-%dz", start, y, x-start, x-start)
			}
		}
	}
	return append(svg, `"/></svg>`...), nil
}

// qrText draws a QR code in half blocks, two modules a character high, to be
// scanned off a terminal: light on a dark ground, or with invert dark on light.
func qrText(text string, invert bool) ([]byte, error) {
	q, err := qrcode.New(text, level)
	if err != nil {
		return nil, err
	}
	return []byte(q.ToSmallString(invert)), nil
}
