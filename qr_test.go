package main

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// program returns the path of a program that a test needs. Without it the test
// is skipped, or fails where WXSCAN_E2E is set.
func program(t *testing.T, name, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
		return path
	case os.Getenv("WXSCAN_E2E") != "":
		t.Fatalf("%s is missing, and WXSCAN_E2E is set: apt-get install %s", name, debianPackage)
	default:
		t.Skipf("%s is missing: apt-get install %s", name, debianPackage)
	}
	return ""
}

// drawn returns the picture of a text.
func drawn(t *testing.T, text string) image.Image {
	t.Helper()
	data, err := qrPNG(text)
	must(t, err)
	picture, err := png.Decode(bytes.NewReader(data))
	must(t, err)
	return picture
}

func TestThePictureHasWholeModulesABorderAndLevelLow(t *testing.T) {
	const border = 4 * modulePixels
	text := strings.Repeat("a", 50) // level L takes 29 modules for it, M 33
	picture := drawn(t, text)
	size := 2*border + 29*modulePixels
	if picture.Bounds() != image.Rect(0, 0, size, size) {
		t.Fatalf("%v, want %d", picture.Bounds(), size)
	}
	dark := func(x, y int) bool { r, _, _, _ := picture.At(x, y).RGBA(); return r == 0 }
	for y := range size {
		for x := range size {
			if inside := min(x, y, size-1-x, size-1-y) >= border; dark(x, y) && !inside {
				t.Fatalf("the border is dark at %d, %d", x, y)
			}
			if dark(x, y) != dark(x-x%modulePixels, y-y%modulePixels) {
				t.Fatalf("the module at %d, %d is of two colours", x, y)
			}
		}
	}
	half, err := qrText(text, false)
	must(t, err)
	if line, _, _ := strings.Cut(string(half), "\n"); len([]rune(line)) != 4+29+4 {
		t.Errorf("%d modules in text, want 37", len([]rune(line)))
	}
	if _, err := qrPNG(strings.Repeat("a", 3000)); err == nil {
		t.Error("3000 bytes fit a QR code")
	}
}

// TestScannersReadThePicture has zbarimg read the PNG of both flows, on white
// and on black, and the text as a dark terminal shows it.
func TestScannersReadThePicture(t *testing.T) {
	zbarimg := program(t, "zbarimg", "zbar-tools")
	w := newWorld(t, "PUBLIC_URL=https://login.example.com")
	for _, begin := range []string{"getauthqr", "getloginqr"} {
		qr := w.begin(t, begin)
		out := w.do("GET", "/wechat/qr.png?ticket="+url.QueryEscape(qr.Ticket), "")
		picture, err := png.Decode(out.Body)
		must(t, err)
		text := w.do("GET", "/wechat/qr.txt?ticket="+url.QueryEscape(qr.Ticket), "").Body.String()
		for name, shown := range map[string]image.Image{
			"on white": paste(picture, color.White), "on black": paste(picture, color.Black), "as text": terminal(text),
		} {
			file := filepath.Join(t.TempDir(), "qr.png")
			var encoded bytes.Buffer
			must(t, png.Encode(&encoded, shown))
			must(t, os.WriteFile(file, encoded.Bytes(), 0o600))
			got, err := exec.Command(zbarimg, "--quiet", "--raw", "-Sdisable", "-Sqrcode.enable", file).Output()
			if read := strings.TrimSuffix(string(got), "\n"); err != nil || read != qr.URL {
				t.Errorf("%s %s: zbarimg reads %q, %v, want %q", begin, name, read, err, qr.URL)
			}
		}
	}
}

func paste(picture image.Image, ground color.Color) image.Image {
	const margin = 50
	page := image.NewRGBA(image.Rect(0, 0, picture.Bounds().Dx()+2*margin, picture.Bounds().Dy()+2*margin))
	draw.Draw(page, page.Bounds(), image.NewUniform(ground), image.Point{}, draw.Src)
	draw.Draw(page, picture.Bounds().Add(image.Pt(margin, margin)), picture, image.Point{}, draw.Src)
	return page
}

// terminal draws half blocks as a terminal with white text on black does.
func terminal(text string) image.Image {
	const pixels = 4
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	page := image.NewGray(image.Rect(0, 0, pixels*len([]rune(lines[0])), 2*pixels*len(lines)))
	for y, line := range lines {
		for x, r := range []rune(line) {
			for half := range 2 {
				if r == '█' || r == '▀' && half == 0 || r == '▄' && half == 1 {
					cell := image.Rect(x*pixels, (2*y+half)*pixels, (x+1)*pixels, (2*y+half+1)*pixels)
					draw.Draw(page, cell, image.White, image.Point{}, draw.Src)
				}
			}
		}
	}
	return paste(page, color.Black)
}

func TestSVGShowsTheModulesOfThePNG(t *testing.T) {
	const text = "http://weixin.qq.com/q/02abcdefghijklmnop"
	picture := drawn(t, text)
	svg, err := qrSVG(text)
	must(t, err)
	size := picture.Bounds().Dx() / modulePixels
	dark := make(map[image.Point]bool)
	for _, run := range regexp.MustCompile(`M(\d+) (\d+)h(\d+)v1h-(\d+)z`).FindAllStringSubmatch(string(svg), -1) {
		var x, y, wide int
		fmt.Sscan(strings.Join(run[1:4], " "), &x, &y, &wide)
		for i := range wide {
			dark[image.Pt(x+i, y)] = true
		}
	}
	for y := range size {
		for x := range size {
			if r, _, _, _ := picture.At(x*modulePixels, y*modulePixels).RGBA(); (r == 0) != dark[image.Pt(x, y)] {
				t.Fatalf("module %d, %d: %v in the SVG", x, y, dark[image.Pt(x, y)])
			}
		}
	}
	if want := fmt.Sprintf(`viewBox="0 0 %d %d"`, size, size); !strings.Contains(string(svg), want) {
		t.Errorf("no %s in %.200s", want, svg)
	}
}
